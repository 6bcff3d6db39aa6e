#!/bin/sh
# Makes the namespace and the Secrets of this overlay from the files that deploy/compose/make-secrets.sh makes, random ones: servers have the
# same names there. What is there already is replaced. Needs kubectl, and a context that is no production.
set -eu

root=$(cd "$(dirname "$0")/../../../.." && pwd)
from=${FRAMEWIRE_SECRETS:-$root/deploy/compose/secrets}
"$root/deploy/compose/make-secrets.sh"
kubectl apply -f "$root/deploy/k8s/base/namespace.yaml"

# NAME FILE[=SOURCE]...: the source is a file of the secrets, or a path.
secret() {
  name=$1
  shift
  arguments=
  for file in "$@"; do
    key=${file%%=*} source=${file#*=}
    case $source in /*) ;; *) source=$from/$source ;; esac
    arguments="$arguments --from-file=$key=$source"
  done
  # shellcheck disable=SC2086 # file names without spaces, of ours
  kubectl create secret generic "$name" --namespace framewire $arguments --dry-run=client --output yaml |
    kubectl apply --filename -
}

for service in gateway credits generator; do
  secret "$service-owner" "${service}_database_url=${service}_owner_database_url" "${service}_service_token_secret=service_token_secret"
done
s3="storage_access_key=s3_access_key storage_secret_key=s3_secret_key"
provider="generator_provider_api_key=provider_api_key generator_azure_api_key=azure_api_key generator_runway_api_key=runway_api_key"
# shellcheck disable=SC2086
{
  secret storage-owner storage_database_url=storage_owner_database_url storage_service_token_secret=service_token_secret $s3
  secret gateway gateway_database_url gateway_nats_url gateway_service_token_secret=service_token_secret gateway_bootstrap_key=operator_key
  secret credits credits_database_url credits_nats_url credits_service_token_secret=service_token_secret
  secret generator generator_database_url generator_nats_url generator_service_token_secret=service_token_secret $provider
  secret storage storage_database_url storage_nats_url storage_service_token_secret=service_token_secret $s3
  secret simulator $provider
}
secret bus-operator operator_nats_url
secret postgres-server postgres_password postgres_roles "10-databases.sh=$root/deploy/compose/postgres/10-databases.sh"
secret nats-server "nats.conf=$root/deploy/nats/nats.conf" passwords.conf=nats_passwords
secret s3-server s3_access_key s3_secret_key

#!/bin/sh
# Makes the secrets of docker-compose.yml, random ones, in FRAMEWIRE_SECRETS (default: deploy/compose/secrets, which git ignores).
# What is there stays: Postgres and MinIO keep the passwords of their first start.
#
#   deploy/compose/make-secrets.sh && docker compose up --build --detach
#
# FRAMEWIRE_PROVIDER_API_KEY, FRAMEWIRE_AZURE_API_KEY and FRAMEWIRE_RUNWAY_API_KEY, when set, are keys of real providers; otherwise ones
# for the simulator are made.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
to=${FRAMEWIRE_SECRETS:-$here/secrets}
umask 022
mkdir -p "$to"
# The directory is closed to other users. The files are readable, since containers read them as users of their own.
chmod 700 "$to"

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# Whole or not at all, so that a run that was cut off leaves no empty secret behind.
put() {
  cat >"$to/.draft"
  chmod 444 "$to/.draft"
  mv -f "$to/.draft" "$to/$1"
}

# Younger than the others: those who have them get it here.
[ -e "$to/azure_api_key" ] || printf '%s' "${FRAMEWIRE_AZURE_API_KEY:-$(random)}" | put azure_api_key
[ -e "$to/runway_api_key" ] || printf '%s' "${FRAMEWIRE_RUNWAY_API_KEY:-$(random)}" | put runway_api_key
[ -e "$to/grafana_password" ] || random | put grafana_password

if [ -e "$to/operator_key" ]; then
  echo "kept the secrets in $to"
  exit 0
fi

roles='' nats=''
for service in gateway credits generator storage; do
  password=$(random) owner_password=$(random)
  database=postgres:5432/framewire_$service
  echo "postgresql://framewire_$service:$password@$database" | put "${service}_database_url"
  echo "postgresql://framewire_${service}_owner:$owner_password@$database" | put "${service}_owner_database_url"
  roles="${roles}framewire_$service $password
framewire_${service}_owner $owner_password
"
done
printf '%s' "$roles" | put postgres_roles
random | put postgres_password

for user in operator gateway credits generator storage subscriber; do
  password=$(random)
  nats="${nats}${user}_password: \"$password\"
"
  echo "nats://$user:$password@nats:4222" | put "${user}_nats_url"
done
printf '%s' "$nats" | put nats_passwords

echo framewire | put s3_access_key
random | put s3_secret_key
random | put service_token_secret
printf '%s' "${FRAMEWIRE_PROVIDER_API_KEY:-$(random)}" | put provider_api_key
echo "fw_$(random)" | put operator_key # the last one: its presence says that all are there
echo "made the secrets in $to"

#!/bin/sh
# Builds the control plane that `make test-k8s` runs, from the modules that go.mod here pins, into the directory named,
# and puts the custom resource definitions there that clusters get from their makers. Wants Go 1.24 or newer, and ten
# minutes the first time.
set -eu
to=$1
mkdir -p "$to/crds"
to=$(cd "$to" && pwd)
cd "$(dirname "$0")"
version=$(sed -n 's/^.*k8s\.io\/kubernetes \(v[0-9.]*\).*$/\1/p' go.mod)
flags="-s -w -X k8s.io/component-base/version.gitVersion=$version -X k8s.io/client-go/pkg/version.gitVersion=$version"

for package in go.etcd.io/etcd/server/v3=etcd k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager \
    k8s.io/kubernetes/cmd/kubectl; do
  name=${package##*[=/]}
  echo "building $name" >&2
  CGO_ENABLED=0 go build -ldflags "$flags" -o "$to/$name" "${package%=*}"
done

# MODULE@VERSION:FILES
operator=example/prometheus-operator-crd
for from in "github.com/cert-manager/cert-manager@v1.21.2:deploy/crds/cert-manager.io_*.yaml" \
    "github.com/kedacore/keda/v2@v2.21.0:config/crd/bases/keda.sh_*.yaml" \
    "github.com/external-secrets/external-secrets@v0.16.2:config/crds/bases/external-secrets.io_externalsecrets.yaml" \
    "github.com/prometheus-operator/prometheus-operator@v0.85.0:$operator/*_servicemonitors.yaml $operator/*_prometheusrules.yaml"; do
  place=$(go mod download -json "${from%%:*}" | sed -n 's/^.*"Dir": "\(.*\)",$/\1/p')
  # shellcheck disable=SC2086 # patterns
  (cd "$place" && cp -f ${from#*:} "$to/crds/")
done
chmod -R u+w "$to/crds"
touch "$to/built"

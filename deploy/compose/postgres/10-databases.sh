#!/bin/bash
# Runs once, when the cluster is made: a database per service, which nobody else may enter. Its owner migrates it; the service
# itself comes as another role, which can change no table's shape. Passwords: lines "role password" in a secret.
set -euo pipefail

roles=${FRAMEWIRE_ROLES_FILE:-/run/secrets/postgres_roles}

password() {
  awk -v role="$1" '$1 == role { print $2 }' "$roles" | grep . || { echo "$roles: no password of $1" >&2; exit 1; }
}

sql() {
  psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --username "$POSTGRES_USER" "$@"
}

for service in storage credits generator gateway; do
  name=framewire_$service
  owner_password=$(password "${name}_owner")
  role_password=$(password "$name")
  # By standard input, for arguments are for everybody to see.
  sql --dbname "$POSTGRES_DB" <<SQL
SET password_encryption = 'scram-sha-256';
CREATE ROLE ${name}_owner LOGIN PASSWORD '$owner_password';
CREATE ROLE $name LOGIN PASSWORD '$role_password';
CREATE DATABASE $name OWNER ${name}_owner
  TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8';
REVOKE ALL ON DATABASE $name FROM PUBLIC;
GRANT CONNECT, TEMPORARY ON DATABASE $name TO $name;
SQL
  sql --dbname "$name" <<SQL
ALTER SCHEMA public OWNER TO ${name}_owner;
GRANT USAGE ON SCHEMA public TO $name;
SQL
  # The migrations of credits say themselves what its role may do: add to history and change nothing of it.
  if [ "$service" != credits ]; then
    sql --dbname "$name" <<SQL
ALTER DEFAULT PRIVILEGES FOR ROLE ${name}_owner GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO $name;
ALTER DEFAULT PRIVILEGES FOR ROLE ${name}_owner GRANT USAGE, SELECT ON SEQUENCES TO $name;
SQL
  fi
done

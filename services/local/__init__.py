"""The whole system on one machine: Postgres, NATS, S3 and every service, as subprocesses."""

"""The credit ledger: double entry, lots, and holds that are captured or released once."""

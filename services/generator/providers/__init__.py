"""Providers: one file per dialect behind `contract.Provider`; everything else about them is data (`providers.yaml`)."""

"""The generator: everything between "job accepted" and "video stored or failed"."""

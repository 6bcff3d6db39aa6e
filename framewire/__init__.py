"""Framewire for other teams: the clients, the event feed and the contracts (`framewire.*.v1`)."""

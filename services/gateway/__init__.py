"""The gateway: who may call, what a request means, and the video as callers see it."""

"""All work on untrusted image and video bytes.

`facts` is what others import; `sandbox` is the parent's pool of workers. `images`, `videos` and
`marks` are the work itself and run in the worker process alone: a libav crash must cost one worker,
never the service.
"""

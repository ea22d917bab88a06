"""A run that continues where it was, bit by bit.

`checkpoints` saves and resumes the parts of a run. A part (`parts`, `optimizer_part`,
`running_parts`) has tensors, which the ranks spread among them and which load on any number of
ranks, and values, which are each rank's own. To resume, every part first checks whether what was
saved fits it (`snapshot`, `fitting`), and only then is any of them changed. Ranks may hold
different parts, as pipeline stages do (`holders`).

`resizing` loads another number of experts than a model has; `resize_math` is why the fused weights
stay as they are. `stop_request` notes Ctrl-C and the signal by which a cluster preempts a job.
"""

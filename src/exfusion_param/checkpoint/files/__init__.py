"""How checkpoints are stored on disk. Only tensors in torch's own files are ever unpickled.

Files that anyone may have written are read by `reader` (safetensors or torch, whole or in shards)
and `errors` (JSON). Whatever is wrong with them is a `CheckpointError`, never another exception,
and a small file cannot ask for large memory.

A run's checkpoint is a folder (`run_folder`) of tensors, which ranks write together by torch's
distributed checkpoints (`tensor_files`), and of what each rank has for itself (`rank_files`), as
JSON and tensors (`plain_values`). `manifest` lists the files with their checksums.
`processes` lets the ranks fail together: what one cannot write is an error on all of them.
"""

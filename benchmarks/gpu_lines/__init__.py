"""What benchmarks/gpu.py measures; needs torch and the repository, and nothing else.

- `results.py`: results that are on disk at once, and the time that a line has
- `suite.py`: line 1, tests/test_cuda.py
- `steps.py`: line 2, step time and memory of ViT-B/16; the pass over the stacks beside a copy
- `evidence.py`: line 3, ExFusion and its controls on Fashion-MNIST
- `arms.py`, `batches.py`, `augment.py`: what line 3 compares, and on which batches
- `stacked.py`, `stacked_ffns.py`: several seeds as one model with one more dimension
- `alone.py`: one seed, as any script would train it, in a process beside others
- `vit.py`: a ViT of torch.nn, with the names of timm's
"""

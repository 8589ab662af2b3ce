"""Build and submit training jobs for torchrun, Slurm and Kubeflow."""

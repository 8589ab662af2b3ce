"""Build and submit training jobs for torchrun, Slurm, SkyPilot and Kubeflow."""

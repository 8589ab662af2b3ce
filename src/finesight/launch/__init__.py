"""A recipe handed to what starts processes: torchrun, Slurm, SkyPilot, Kubeflow."""

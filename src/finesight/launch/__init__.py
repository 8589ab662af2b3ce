"""Launch training jobs with torchrun, Slurm, SkyPilot or Kubeflow."""

"""Launching on a Slurm cluster: a sweep as one job array (``zoo sweep --slurm``), its record, and its tasks."""

"""What the adapters of some methods go through from step to step, one file each (`deltatune.schedule`)."""

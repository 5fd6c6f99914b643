"""What everything else stands on: command lines, files, data sources, devices, processes, compiled kernels."""

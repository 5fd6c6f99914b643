"""What everything else stands on: command lines, files, foreign weights, devices, processes, compiled kernels."""

"""What a fork in the tests finds already loaded (see conftest.py), so that it starts in a thirtieth of a second."""

# ruff: noqa: F401

import cleanlab.filter
import optuna
import pytest
import scipy.optimize
import scipy.stats
import torch._dynamo  # which models.count_flop loads, in two seconds

import analysis.report
import training.run
import training.search
from runtime import device

device.git_revision()  # asked once: a commit during the tests must not change what their checkpoints hold

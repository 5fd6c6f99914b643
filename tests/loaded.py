"""What a fork in the tests finds already loaded (see conftest.py), so that it starts in a thirtieth of a second."""

import pytest  # noqa: F401
import scipy.optimize
import scipy.stats
import sklearn.metrics  # noqa: F401

import analysis.report
import training.run  # noqa: F401
from runtime import device

device.git_revision()  # asked once: a commit during the tests must not change what their checkpoints hold

"""Whether other programs would load an adapter folder, and compute with it what was trained; from its files alone."""

from deltatune.doctor.judge import Diagnosis as Diagnosis
from deltatune.doctor.judge import diagnose as diagnose
from deltatune.doctor.verdict import Finding as Finding
from deltatune.doctor.verdict import Verdict as Verdict

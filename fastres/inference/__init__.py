"""Inference sessions: a model as a plan of folded nodes, run by the executor that suits the machine."""

from fastres.inference.building import load, optimize
from fastres.inference.checking import VerificationError
from fastres.inference.plan import Plan
from fastres.inference.reporting import Report
from fastres.inference.session import InferenceSession
from fastres.inference.storage import SessionFileError

__all__ = ["InferenceSession", "Plan", "Report", "SessionFileError", "VerificationError", "load", "optimize"]

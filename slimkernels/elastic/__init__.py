"""Make a trained network run at any width and depth: convert, set them, calibrate, count, search, extract, compile, save."""

from slimkernels.elastic.calibrate import calibrate
from slimkernels.elastic.checkpoint import load, save
from slimkernels.elastic.compile import compile
from slimkernels.elastic.convert import convert
from slimkernels.elastic.cost import Cost, cost
from slimkernels.elastic.deploy import Deployed, deploy
from slimkernels.elastic.extract import extract
from slimkernels.elastic.plan import Plan, Stage, WidthGroup, plan
from slimkernels.elastic.report import Report, report
from slimkernels.elastic.result import Candidate, SearchResult
from slimkernels.elastic.search import search
from slimkernels.elastic.width import set_width, view, width

__all__ = [
    "Candidate",
    "Cost",
    "Deployed",
    "Plan",
    "Report",
    "SearchResult",
    "Stage",
    "WidthGroup",
    "calibrate",
    "compile",
    "convert",
    "cost",
    "deploy",
    "extract",
    "load",
    "plan",
    "report",
    "save",
    "search",
    "set_width",
    "view",
    "width",
]

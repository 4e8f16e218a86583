"""Run directories, metric sinks, progress display, statistics over runs and their plots."""

from lockstep.runs.config_json import config_from_json, config_to_json
from lockstep.runs.console import ProgressDisplay, print_curve
from lockstep.runs.directory import RunDirectory, RunState
from lockstep.runs.record import EvalRecord, RunRecord, find_run, read_run
from lockstep.runs.sink import JsonlSink, MemorySink, MetricSink, TeeSink, TensorBoardSink, WandbSink

__all__ = [
    "EvalRecord",
    "JsonlSink",
    "MemorySink",
    "MetricSink",
    "ProgressDisplay",
    "RunDirectory",
    "RunRecord",
    "RunState",
    "TeeSink",
    "TensorBoardSink",
    "WandbSink",
    "config_from_json",
    "config_to_json",
    "find_run",
    "print_curve",
    "read_run",
]

"""Run directories, metric sinks, progress display, statistics over runs and their plots."""

from lockstep.runs.config_json import config_from_json, config_to_json
from lockstep.runs.directory import RunDirectory, RunState
from lockstep.runs.sink import JsonlSink, MemorySink, MetricSink, TeeSink, TensorBoardSink, WandbSink

__all__ = [
    "JsonlSink",
    "MemorySink",
    "MetricSink",
    "RunDirectory",
    "RunState",
    "TeeSink",
    "TensorBoardSink",
    "WandbSink",
    "config_from_json",
    "config_to_json",
]

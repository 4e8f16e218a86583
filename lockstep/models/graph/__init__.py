"""Networks that came from another framework, as data: a graph of operations in the meaning of ONNX and a module that
runs it, every weight trainable. Importers build graphs; policies, exporters and policy folders carry them."""

from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.folder import load_graph, save_graph
from lockstep.models.graph.graph import About, Graph, Node, Port
from lockstep.models.graph.module import GraphModule

__all__ = ["About", "Graph", "GraphBuilder", "GraphModule", "Node", "Port", "load_graph", "save_graph"]

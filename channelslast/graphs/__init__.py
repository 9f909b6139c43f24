"CUDA graphs of a model's forward and backward pass, replayed in place of Python."

from channelslast.graphs.callback import CudaGraph
from channelslast.graphs.module import GraphedModule

__all__ = ["CudaGraph", "GraphedModule"]

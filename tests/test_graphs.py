"""Training as a GPU would run it, with CPU tensors: what is captured is recorded, then repeated.

A CUDA graph holds the kernels of one call and their memory. When it is replayed no Python runs:
numbers that Python computed and branches that it took stay as they were, and a call that has to
wait for a value cannot be captured at all. `Graph` does the same with operations on the CPU, so
that a run with it must equal the eager run to the last bit. `Places` follows which tensors a GPU
would hold through the eager run, and refuses to mix them with those of the CPU."""
import contextlib
import importlib
import sys
import traceback
import types

import pytest
import torch
from conftest import BLIND, ENVS, same, small, takes, timeless
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a GPU would have to wait for, or to fetch from the memory of the CPU.
WAITS = {f"aten::{name}" for name in (
    "_local_scalar_dense equal is_nonzero nonzero masked_select _unique2 repeat_interleave "
    "_linalg_eigh linalg_cholesky_ex").split()}
IMAGES = {"Discrete": "probes:ImageLast-v0", "Box": "probes:BoxImage-v0"}
OPTIONS = [  # a run or two of each script that meet as many branches as they can
    ("reinforce", "Discrete", dict()), ("a2c", "Discrete", dict(ent_coef=0.01)),
    ("ppo", "Discrete", dict(ent_coef=0.01, clip_coef=0.01, learning_rate=0.01)),
    ("ppo", "Box", dict(objective="kl", recompute_advantages=True)),
    ("trpo", "Box", dict(max_kl=1.0)),  # a step that the line search shortens
    ("dqn", "Discrete", dict(dueling=True, prioritized=True, n_step=3, tau=0.1, target_every=0)),
    ("ddpg", "Box", dict(noise="ou")), ("naf", "Box", {}),
    ("cem_es", "Discrete", dict(method="es", hidden_size=8)),
    ("mbrl_mpc", "Box", dict(propagation="tsinf", terminal_value=True, replan_every=2))]
MORE_OPTIONS = [
    ("reinforce", "Box", dict(baseline="none")),
    ("a2c", "Box", dict(gae_lambda=0.9)),
    ("ppo", "Discrete", dict(objective="kl", anneal=False)),
    ("trpo", "Discrete", dict(line_search=False)),
    ("dqn", "Discrete", dict(double=False, exploration="boltzmann", target_every=64)),
    ("ddpg", "Box", dict(maximizer="cem")),
    ("mbrl_mpc", "Discrete", dict(planner="random")),
    ("mbrl_mpc", "Box", dict(planner="policy"))]
GPU = types.SimpleNamespace(type="cuda")


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def memory(x):
    return x.untyped_storage()._cdata


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CPU"):
            with self:  # what consists of other operations is recorded as these
                results = function.decompose(*args, **kwargs or {})
            if results is not NotImplemented:
                return results
        schema, inputs = function._schema, tensors((args, kwargs))
        masks = [x for x in inputs if x.dtype == torch.bool] if "index" in schema.name else []
        if schema.name in WAITS or masks:
            raise RuntimeError(f"{schema.name} cannot be captured")
        if schema.name == "aten::lift_fresh" and not any(  # which optimizers make on the CPU only
                "torch/optim" in frame.filename for frame in traceback.extract_stack(limit=9)):
            raise RuntimeError("a tensor made of numbers cannot be captured")
        if schema.is_mutable:
            self.before += [(x, x.clone()) for x in inputs]
        results = function(*args, **kwargs or {})
        outputs = [x for x in tensors(results) if memory(x) not in set(map(memory, inputs))]
        if schema.is_mutable or outputs:  # otherwise it was a view, and goes on being one
            self.calls.append((function, args, kwargs or {}, outputs))
        return results

    @contextlib.contextmanager
    def capture(self):
        """Record what is called, and leave no trace of having run it."""
        state = torch.get_rng_state()
        with self:
            yield
        with torch.inference_mode():
            for x, old in reversed(self.before):
                x.copy_(old)
        torch.set_rng_state(state)

    @torch.inference_mode()
    def replay(self):
        Graph.replays += 1
        for function, args, kwargs, outputs in self.calls:
            inputs = set(map(memory, tensors((args, kwargs))))
            results = [x for x in tensors(function(*args, **kwargs)) if memory(x) not in inputs]
            for x, new in zip(outputs, results, strict=True):
                x.copy_(new)


class Places(TorchFunctionMode):
    """Keeps track of what the memory of a GPU would hold, and refuses to mix it with the CPU's."""

    def __init__(self):
        super().__init__()
        self.places = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        inputs = {memory(x): (x.dim(), self.places.get(memory(x))) for x in tensors((args, kwargs))}
        places = {place for dim, place in inputs.values() if dim or place == "GPU"}
        if "GPU" in places and name == "numpy" and not kwargs.get("force"):
            raise RuntimeError("numpy cannot read the memory of a GPU")
        if places >= {"CPU", "GPU"} and name not in ("to", "copy_", "__getitem__", "__setitem__"):
            raise RuntimeError(f"{name} of tensors of CPU and GPU")
        results = function(*args, **kwargs)
        moved = name == "to" and any(isinstance(x, torch.device) for x in args)
        if name == "cpu":
            results, place = results.clone(), "CPU"
        elif moved or kwargs.get("device") is not None:
            place = "GPU"
        elif not inputs:
            place = "CPU"
        else:
            place = "GPU" if "GPU" in places else "CPU" if "CPU" in places else None
        for x in tensors(results):
            if moved or memory(x) not in inputs:
                self.places[memory(x)] = place
        return results


@pytest.fixture
def graphs(monkeypatch):
    """Lets `cuda_graph` record and replay such graphs, with optimizers as they are on a GPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Graph, "replays", 0)
    for name in ("adam", "rmsprop"):
        monkeypatch.setitem(vars(sys.modules[f"torch.optim.{name}"]),
                            "_get_capturable_supported_devices", lambda **kwargs: ["cpu"])

    def on_gpu(optimizer):
        return lambda *args, **kwargs: optimizer(*args, **kwargs | dict(
            capturable=True, foreach=not kwargs.get("fused")))

    for name in ("Adam", "RMSprop"):
        monkeypatch.setattr(torch.optim, name, on_gpu(getattr(torch.optim, name)))


def packed(function):
    """The function with its inputs packed in memory, as how they lie changes how sums round."""
    return lambda *inputs: function(*(x.contiguous() for x in inputs))


def compare(module, monkeypatch, args):
    """Train eagerly, with an eye on where tensors are, and with graphs."""
    cuda_graph, histories, agents = module.cuda_graph, [], []
    for watch, wrap in ((Places(), lambda function: function),
                        (None, lambda function: cuda_graph(function, GPU))):
        monkeypatch.setattr(module, "cuda_graph", lambda function, device: packed(wrap(function)))
        with watch or contextlib.nullcontext():
            agent, history = module.train(args)
            if watch:
                module.evaluate(agent, args, 1)
        agents.append(agent.state_dict()), histories.append(timeless(history))
    assert Graph.replays > 5
    assert same(*histories) and same(*agents)


def options(name, kind, settings):
    module = importlib.import_module(name)
    return module, module.Args(**small(name, env=ENVS[kind]) | settings)


@pytest.mark.parametrize("name, kind, settings", OPTIONS)
def test_a_run_of_replayed_graphs_is_the_eager_run(graphs, monkeypatch, name, kind, settings):
    module, args = options(name, kind, settings)
    compare(module, monkeypatch, args)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, kind, settings", MORE_OPTIONS)
def test_so_it_is_with_other_settings(graphs, monkeypatch, name, kind, settings):
    module, args = options(name, kind, settings)
    compare(module, monkeypatch, args)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ENVS)
def test_so_it_is_with_small_settings(script, module, graphs, monkeypatch, kind):
    if kind not in module.ACTION_SPACES:
        pytest.skip(f"{script} does not take {kind} actions")
    compare(module, monkeypatch, module.Args(**small(script, env=ENVS[kind])))


@pytest.mark.plumbing
def test_so_it_is_with_images(script, module, graphs, monkeypatch):
    if script in BLIND:
        pytest.skip(f"{script} does not take images")
    env = IMAGES[takes(module, *IMAGES)[0]]
    args = module.Args(**small(script, env=env, total_timesteps=256))
    compare(module, monkeypatch, args)


@pytest.mark.plumbing
def test_a_graph_repeats_what_it_recorded_and_no_more(script, module, graphs):
    total, factor = torch.zeros(2), [1.0]

    def function(x):
        total.add_(x)
        return total * factor[0] + torch.rand(2)

    function, x = module.cuda_graph(function, GPU), torch.ones(2)
    torch.manual_seed(0)
    results = [function(x) for _ in range(5)]
    factor[0] = 9.0
    results.append(function(2 * x))
    torch.manual_seed(0)
    expected = [k + torch.rand(2) for k in (1, 2, 3, 4, 5, 7)]
    assert same(results, expected)


def test_what_mixes_tensors_of_cpu_and_gpu_is_refused():
    device = torch.device("cpu")
    with Places():
        here, there = torch.ones(2), torch.ones(2, device=device)
        there += torch.ones(())  # a single number may come from the CPU
        assert there.cpu().numpy().sum() == 4 and here.numpy().sum() == 2
        with pytest.raises(RuntimeError, match="add of tensors of CPU and GPU"):
            here + there
        with pytest.raises(RuntimeError, match="numpy cannot read"):
            (2 * there).numpy()
        assert torch.equal(there, 2 * torch.from_numpy(here.numpy()).to(device))


@pytest.mark.parametrize("wait", [
    lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor(1.0),
    lambda x: x if x.sum() > 0 else -x])
def test_a_graph_refuses_what_a_gpu_would_wait_for(graphs, wait):
    function = importlib.import_module("ppo").cuda_graph(wait, GPU)
    for _ in range(3):
        function(torch.ones(2))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        function(torch.ones(2))

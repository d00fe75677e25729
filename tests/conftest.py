"""What all tests share: the scripts that exist, small settings for each, a folder for each test."""
import importlib
import inspect
import pathlib
import signal
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]  # for the scripts, and for environments like probes:Image-v0

NAMES = "reinforce a2c ppo trpo dqn ddpg naf cem_es mbrl_mpc".split()
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]

# Settings that make a run of a few hundred steps exercise all of a script.
SMALL = {
    "reinforce": dict(num_envs=4, hidden_size=16),
    "a2c": dict(num_envs=4, num_steps=4, hidden_size=16),
    "ppo": dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, hidden_size=16),
    "trpo": dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, hidden_size=16),
    "cem_es": dict(num_envs=4, population=4, pairs=2, elite_fraction=0.5, max_episode_steps=16),
    "dqn": dict(num_envs=4, train_every=4, num_updates=2, buffer_size=200, batch_size=16,
                learning_starts=32, hidden_size=16),
    "ddpg": dict(num_envs=2, train_every=4, num_updates=2, buffer_size=200, batch_size=16,
                 learning_starts=32, hidden_size=16),
    "naf": dict(num_envs=2, train_every=4, num_updates=2, buffer_size=200, batch_size=16,
                learning_starts=32, hidden_size=16),
    "mbrl_mpc": dict(num_envs=4, num_steps=16, learning_starts=32, num_updates=4, batch_size=16,
                     hidden_size=16, ensemble_size=2, horizon=3, population=8,
                     elites=2, rounds=2),
}
# Settings with which training must diverge: in its metrics first, or in its weights first.
DIVERGENT = {
    "reinforce": [dict(learning_rate=1e30), dict(learning_rate=3e38, baseline="none")],
    "a2c": [dict(learning_rate=1e30), dict(learning_rate=3e38)],
    "ppo": [dict(learning_rate=1e30), dict(learning_rate=3e38, num_minibatches=1, update_epochs=1)],
    "trpo": [dict(learning_rate=1e30), dict(learning_rate=3e38, num_minibatches=1,
                                            update_epochs=1)],
    "dqn": [dict(learning_rate=1e30), dict(learning_rate=3e38, num_updates=1)],
    "ddpg": [dict(learning_rate=1e30), dict(learning_rate=3e38, num_updates=1)],
    "naf": [dict(learning_rate=1e30), dict(learning_rate=3e38, num_updates=1)],
    "cem_es": [dict(init_sigma=1e30), dict(init_sigma=3e38)],
    "mbrl_mpc": [dict(learning_rate=1e30), dict(learning_rate=3e38, num_updates=1)],
}
# Scripts whose policies stretch over the bounds of their actions, so that these must be finite.
BOUNDED = {"ddpg", "naf"}
# Scripts that refuse images.
BLIND = {"mbrl_mpc"}
# One environment for each kind of actions, and for each other kind of space a script may meet.
ENVS = {"Discrete": "CartPole-v1", "Box": "Pendulum-v1"}
KINDS = {
    "Discrete": ["CartPole-v1", "probes:Start-v0", "probes:Dict-v0", "probes:Tuple-v0",
                 "probes:DiscreteObs-v0", "probes:ImageFirst-v0", "probes:ImageLast-v0"],
    "Box": ["Pendulum-v1", "InvertedPendulum-v5", "probes:Bounds-v0", "probes:Unbounded-v0",
            "probes:BoxDict-v0", "probes:BoxImage-v0"],
}


def small(script, **changes):
    """Arguments of a short run of `script` on the CPU."""
    return dict(total_timesteps=512, device="cpu") | SMALL.get(script, {}) | changes


def flags(settings):
    """The command line that says the same as these arguments of Args."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [
            f"--{flag}", str(value)]
    return words


def takes(module, *kinds):
    """Those of the kinds of actions that the script takes."""
    return [kind for kind in kinds if kind in module.ACTION_SPACES]


def same(a, b):
    """Equal to the last bit, through dictionaries, lists and tensors; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(
            a.nan_to_num(), b.nan_to_num())
    return a == b or (a != a and b != b)


def timeless(history):
    """The rows of a history without their time."""
    return [{name: row[name] for name in row if name != "seconds"} for row in history]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the exhaustive tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: skipped without --all")
    config.addinivalue_line(
        "markers", "plumbing(*scripts, kind=None): without --all run it on ppo, ddpg and these "
        "scripts; never on those without actions of this kind")


def pytest_collection_modifyitems(config, items):
    skip = pytest.mark.skip(reason="exhaustive; python -m pytest --all runs it")
    for item in items:
        if item.get_closest_marker("exhaustive") and not config.getoption("all"):
            item.add_marker(skip)


def pytest_generate_tests(metafunc):
    """A test with a `script` runs on all; one of the plumbing, which is one text, on a few."""
    if "script" not in metafunc.fixturenames:
        return
    scripts, marker = SCRIPTS, metafunc.definition.get_closest_marker("plumbing")
    if marker and not metafunc.config.getoption("all"):
        scripts = [name for name in SCRIPTS if name in ("ppo", "ddpg", *marker.args)]
    if marker and (kind := marker.kwargs.get("kind")):
        scripts = [name for name in scripts
                   if kind in importlib.import_module(name).ACTION_SPACES]
    metafunc.parametrize("script", scripts)


@pytest.fixture
def module(script):
    return importlib.import_module(script)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs in an empty folder, and puts back what a command line changes in the process."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = list(sys.path)
    yield
    sys.path[:] = path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def command(script, module, monkeypatch, capsys):
    """command(*words) calls main() as the command line would; gives exit code, output, errors."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


def copied(x):
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) lists a function's calls: arguments by name, as they were, and `out`."""

    def spy(owner, name):
        function, calls = getattr(owner, name), []

        def wrapper(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs).arguments
            calls.append({name: copied(x) for name, x in bound.items()})
            calls[-1]["out"] = out = function(*args, **kwargs)
            return out

        monkeypatch.setattr(owner, name, wrapper)
        return calls

    return spy

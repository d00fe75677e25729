"""What every script promises, whatever its algorithm: form, command line, errors, reliability."""
import ast
import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import processes
import pytest
import torch
from conftest import (
    BLIND, BOUNDED, DIVERGENT, ENVS, KINDS, NAMES, ROOT, SCRIPTS, TESTS, flags, same, small, takes,
    timeless)

BANNER = re.compile(r"^# =+ Plumbing\n", re.MULTILINE)
ALLOWED_IMPORTS = {*sys.stdlib_module_names, "numpy", "torch", "gymnasium"}
ENDING = re.compile(r"return (-?[\d.]+) ± ([\d.]+) over (\d+) episodes")


def python(*words, **kwargs):
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, **kwargs)


def some_env(module):
    return ENVS[takes(module, "Discrete", "Box")[0]]


def fraction(module):
    """The name of a setting of the script that goes from 0 to 1."""
    return next(field.name for field in dataclasses.fields(module.Args)
                if field.type is float and field.metadata["limits"] == [0, 1])


def run_flags(script, module, **changes):
    """A short run into the folder `run`."""
    return flags(small(script, **dict(env=some_env(module), run_dir="run") | changes))


def table(folder):
    """metrics.csv without its time."""
    with open(os.path.join(folder, "metrics.csv")) as file:
        return timeless(csv.DictReader(file))


@pytest.fixture
def run(script, module, command):
    """A finished run in the folder `run`."""
    code, out, err = command(*run_flags(script, module), "--episodes", 2)
    assert (code, err) == (0, ""), err
    return "run"


def assert_one_line(result, *words, code=2):
    """The command failed as it should: one line on standard error that contains these words."""
    got, _, err = result
    assert got == code, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err, err


# Form.


def test_nothing_else_stands_at_the_top_of_the_repository():
    allowed = {"README.md", "requirements.txt", "tests", *(f"{name}.py" for name in NAMES)}
    made = {"runs", "__pycache__", "MUJOCO_LOG.TXT"}  # by running the scripts
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - made <= allowed


def test_all_scripts_end_with_the_same_plumbing():
    texts = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
    starts = {script: BANNER.search(text) for script, text in texts.items()}
    assert all(starts.values())
    endings = {script: texts[script][start.start():] for script, start in starts.items()}
    for script in SCRIPTS:
        assert endings[script] == endings[SCRIPTS[0]], f"{script} and {SCRIPTS[0]} differ"


def test_the_file_begins_with_its_licence_and_its_docstring_and_keeps_its_width(script):
    text = (ROOT / f"{script}.py").read_text()
    assert text.startswith('# SPDX-License-Identifier: MIT\n"""')
    assert [line for line in text.splitlines() if len(line) > 100] == []


def test_only_allowed_things_stand_at_the_top_level(script):
    first, *body = ast.parse((ROOT / f"{script}.py").read_text()).body
    *body, last = body
    assert isinstance(first, ast.Expr) and isinstance(first.value.value, str)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"
    for node in body:
        if isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target)
                     if isinstance(name, ast.Name)]
            assert all(name.id.isupper() for name in names), ast.unparse(node)  # constants
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)), (
                ast.unparse(node))
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert names >= {"Args", "Agent", "train", "evaluate", "load", "main"}


def test_imports_at_the_top_are_the_standard_library_numpy_torch_and_gymnasium(script):
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        modules = {ast.Import: lambda: [name.name for name in node.names],
                   ast.ImportFrom: lambda: [node.module]}.get(type(node), list)()
        assert {name.split(".")[0] for name in modules} <= ALLOWED_IMPORTS


def test_no_script_imports_another(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.name for node in nodes for name in node.names} | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not names & set(NAMES)


def test_importing_does_nothing(tmp_path):
    code = f"""
import importlib, random, signal, sys
import numpy as np, torch, gymnasium
states = lambda: (random.getstate(), np.random.get_state()[1].tolist(),
                  torch.get_rng_state().tolist(), torch.get_num_threads(), list(sys.path),
                  signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
before = states()
for script in {SCRIPTS!r}:
    importlib.import_module(script)
    assert states() == before, script
    assert "matplotlib" not in sys.modules and "tensorboard" not in sys.modules, script
"""
    done = python("-W", "error", "-c", code, "--no-such-flag", cwd=tmp_path,
                  env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_alone_in_an_empty_folder_runs(script, module, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    settings = small(script, env=some_env(module))
    leave = functools.partial(processes.leave, str(ROOT), str(TESTS))
    words = *flags(settings), "--episodes", 3
    code, out, err = processes.Script(
        tmp_path / f"{script}.py", *words, folder=tmp_path, bomb=leave).end()
    assert (code, err) == (0, "")
    last = out.splitlines()[-1]
    mean, _, episodes = ENDING.search(last).groups()
    assert math.isfinite(float(mean)) and episodes == "3"
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name in last and folder.name.startswith(f"{settings['env']}__{script}__1__")


# Settings.


def test_help_shows_the_docstring_and_every_setting_with_its_default(script, module, command):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert module.__doc__.strip() in out
    flat = " ".join(out.split())
    for field in dataclasses.fields(module.Args):
        assert "--" + field.name.replace("_", "-") in out
        assert " ".join(f"{field.metadata['help']} ({field.default})".split()) in flat
    for flag in ("--resume", "--evaluate", "--episodes", "--video", "--render"):
        assert flag in out


def test_what_is_given_beats_the_preset_which_beats_the_default(script, module):
    defaults = {field.name: field.default for field in dataclasses.fields(module.Args)}
    assert module.PRESETS
    for pattern, preset in module.PRESETS.items():
        env = pattern.replace("*", "Pong-v5")
        assert vars(module.Args(env=env)) == defaults | preset | {"env": env}
        assert vars(module.Args(**defaults | {"env": env})) == defaults | {"env": env}
    assert vars(module.Args(env="Other-v0")) == defaults | {"env": "Other-v0"}


def test_a_flag_beats_the_preset_and_the_run_says_which_it_used(
        script, module, command, monkeypatch):
    env, name = some_env(module), fraction(module)
    monkeypatch.setitem(module.PRESETS, env, {name: 0.5, "threads": 2})
    words = run_flags(script, module, **{"env": env, name: 0.75})
    code, out, _ = command(*words, "--episodes", 1)
    with open("run/args.json") as file:
        saved = json.load(file)
    assert code == 0 and (saved[name], saved["threads"]) == (0.75, 2)
    assert {f"{name}=0.75", "threads=2*"} <= set(out.split())


def test_unknown_settings_and_values_out_of_range_are_refused(script, module):
    name = fraction(module)
    for wrong in (dict(leaning_rate=1), {name: 1.5}, {name: -0.1}, {name: math.nan},
                  dict(num_envs=0), dict(seed=-1), dict(total_timesteps=0)):
        with pytest.raises(module.UserError, match=next(iter(wrong))):
            module.Args(**wrong)


def test_settings_of_another_type_become_what_they_stand_for_or_are_refused(script, module):
    args = module.Args(seed=np.int64(3), run_dir=pathlib.Path("run"), **{
        fraction(module): np.float64(0.5)})
    assert type(args.seed) is int and args.run_dir == "run"
    assert type(getattr(args, fraction(module))) is float
    switches = [{field.name: "False"} for field in dataclasses.fields(module.Args)
                if field.type is bool]
    for wrong in (dict(num_envs=2.5), dict(seed="three"), dict(seed=None), dict(env=None),
                  *switches):
        with pytest.raises(module.UserError, match=next(iter(wrong))):
            module.Args(**wrong)


def test_arguments_can_be_copied_with_changes(script, module):
    args = module.Args(seed=3, num_envs=2)
    assert dataclasses.replace(args, seed=4) == module.Args(**vars(args) | {"seed": 4})


# Training.


@pytest.mark.parametrize("kind, env", [(kind, env) for kind, envs in KINDS.items() for env in envs])
def test_every_kind_of_space_trains_and_acts(script, module, kind, env):
    if kind not in module.ACTION_SPACES:
        with pytest.raises(module.UserError, match=kind):
            module.Envs(env, 2, torch.device("cpu"))
        return
    args = module.Args(**small(script, env=env, total_timesteps=128))
    if "Unbounded" in env and script in BOUNDED:
        with pytest.raises(module.UserError, match="finite bounds.*ppo"):
            module.train(args)
        return
    if "Image" in env and script in BLIND:
        with pytest.raises(module.UserError, match="images.*ppo"):
            module.train(args)
        return
    agent, history = module.train(args)
    assert history[-1]["step"] >= 128
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    assert np.isfinite(module.evaluate(agent, dataclasses.replace(args, seed=2), 2)).all()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(script, module):
    settings = small(script, env=some_env(module))
    (a, first), (b, second), (c, _) = (
        module.train(module.Args(**settings, seed=seed)) for seed in (1, 1, 2))
    assert same(a.state_dict(), b.state_dict()) and same(timeless(first), timeless(second))
    assert not same(a.state_dict(), c.state_dict())


def test_training_and_evaluation_meet_other_episodes_and_so_do_other_seeds(
        script, module, monkeypatch):
    reset, seeds = module.Envs.reset, []
    monkeypatch.setattr(module.Envs, "reset", lambda self, seed: (
        seeds.append(seed), reset(self, seed))[1])
    for seed in (1, 2):
        args = module.Args(**small(script, env=some_env(module), seed=seed, checkpoint_every=128))
        agent, _ = module.train(args)
        module.evaluate(agent, args, 40)
    assert len(seeds) > 8 and len(set(seeds)) == len(seeds)


def test_training_from_python_writes_nothing_and_reads_no_command_line(
        script, module, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    agent, history = module.train(module.Args(**small(script, env=some_env(module))))
    assert list(tmp_path.iterdir()) == []
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert isinstance(agent, torch.nn.Module) and isinstance(history[-1]["episode_return"], float)
    assert all(math.isfinite(value) for value in history[-1].values())


def test_an_environment_that_never_ends_can_be_trained_on(script, module):
    agent, history = module.train(module.Args(**small(script, env=probe(module, "Endless"))))
    assert history[-1]["step"] >= 512
    if script in ("reinforce", "cem_es"):  # they cut episodes off, which is then their end
        assert {row["episode_return"] for row in history} == {16.0}
    else:
        assert math.isnan(history[-1]["episode_return"])
    assert all(value.isfinite().all() for value in agent.state_dict().values())


def test_the_agent_acts_without_gradients_and_its_mode_is_no_draw(script, module):
    args = module.Args(**small(script, env=some_env(module)))
    envs = module.Envs(args.env, 3, torch.device("cpu"))
    agent = module.Agent(envs.obs_space, envs.action_space, args)
    envs.reset(1)
    acts = []
    for _ in range(2):
        if hasattr(agent, "begin"):  # what a planner planned before is no part of its mode
            agent.begin(torch.ones(3))
        acts.append(agent.act(envs.obs, deterministic=True))
    first, second = acts
    assert len(first) == 3 and not first.requires_grad and torch.equal(first, second)


def test_the_same_evaluation_scores_the_same_and_each_episode_counts_once(script, module):
    args = module.Args(**small(script, env=some_env(module)))
    agent, _ = module.train(args)
    returns = [module.evaluate(agent, args, 25) for _ in range(2)]
    assert returns[0].shape == (25,) and (returns[0] == returns[1]).all()
    assert len(set(returns[0])) > 1


def test_an_evaluation_takes_the_mode_and_does_not_prefer_short_episodes(
        script, module, monkeypatch):
    args = module.Args(**small(script, env=probe(module, "Uneven"), total_timesteps=128))
    agent, _ = module.train(args)
    act, modes = module.Agent.act, []
    monkeypatch.setattr(module.Agent, "act", lambda self, obs, deterministic=False: (
        modes.append(deterministic), act(self, obs, deterministic))[1])
    returns = module.evaluate(agent, args, 400)
    assert all(modes) and modes
    assert returns.mean() == pytest.approx(5, abs=0.8)  # episodes of 1 and of 9, four deviations


def test_a_reader_that_goes_away_stops_a_run_without_a_traceback():
    words = [sys.executable, ROOT / "ppo.py", *flags(small("ppo", env="CartPole-v1"))]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    error = done.communicate()[1]
    assert done.returncode and "Traceback" not in error, error


def test_the_users_own_environment_is_found_in_the_current_folder(script, module, tmp_path):
    kind = takes(module, "Discrete", "Box")[0]
    space = {"Discrete": "Discrete(2)", "Box": "Box(-1, 1, (1,))"}[kind]
    (tmp_path / "my_module.py").write_text(f"""
import gymnasium as gym
from gymnasium.spaces import Box, Discrete

class MyEnv(gym.Env):
    observation_space, action_space = Box(-1, 1, (2,)), {space}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {{}}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 7, False, {{}}

gym.register("MyEnv-v0", MyEnv)
""")
    words = flags(small(script, env="my_module:MyEnv-v0"))
    code, out, err = start(script, tmp_path, *words).end()
    assert (code, err) == (0, "") and ENDING.search(out)[1] == "7.0"
    (folder,) = (tmp_path / "runs").iterdir()
    assert not set(folder.name) & set(":/ ")


# Environments.


def rollout(module, env, steps, num_envs=3, action=None, **kwargs):
    """(obs, next_obs, rewards, terminations, dones) of each step, and the Envs."""
    envs = module.Envs(env, num_envs, torch.device("cpu"), **kwargs)
    envs.reset(1)
    rows = []
    for _ in range(steps):
        obs = envs.obs
        rows.append((obs, *envs.step(zeros(envs))))
    return *(torch.stack(column) for column in zip(*rows)), envs


def zeros(envs):
    """An action 0 for each environment."""
    return torch.as_tensor(np.zeros((len(envs.obs), *envs.action_space.shape),
                                    envs.action_space.dtype))


def probe(module, name):
    """A probe with actions that the script takes."""
    return f"probes:{name if 'Discrete' in module.ACTION_SPACES else 'Box' + name}-v0"


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # a reward of shape (1,)
@pytest.mark.parametrize("name", ["Counter", "Reusing"])
def test_next_obs_follows_obs_even_where_an_episode_ends(script, module, name):
    env = probe(module, name)
    obs, next_obs, rewards, terminations, dones, envs = rollout(module, env, 12)
    assert torch.equal(next_obs, obs + 1)
    assert obs[:, 0, 0].tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]  # no step between episodes
    assert (rewards == 1).all()
    assert dones[:, 0].tolist() == terminations[:, 0].tolist() == [0, 0, 0, 0, 1] * 2 + [0, 0]
    assert rewards.shape == dones.shape == terminations.shape == (12, 3)
    assert envs.episodes == [(i, 5.0, 5) for i in range(3)] * 2


def test_next_obs_keeps_fractions_where_the_next_episode_begins_with_whole_numbers(script, module):
    env = probe(module, "WholeFirst")
    obs, next_obs, *_ = rollout(module, env, 6, num_envs=1)
    assert obs.flatten().tolist() == [0, 0.5, 1] * 2
    assert next_obs.flatten().tolist() == [0.5, 1, 1.5] * 2


def test_the_environments_say_where_an_episode_begins(script, module):
    envs = module.Envs(probe(module, "Uneven"), 5, torch.device("cpu"))  # episodes of 1 and of 9
    envs.reset(1)
    begins = []
    for _ in range(30):
        assert torch.equal(envs.begins.bool(), envs.obs.squeeze(-1) == 0)
        begins.append(envs.begins)
        envs.step(zeros(envs))
    assert 0 < torch.stack(begins[1:]).mean() < 1


def test_an_evaluation_tells_an_agent_that_asks_where_episodes_begin(script, module):
    args = module.Args(**small(script, env=probe(module, "Uneven"), total_timesteps=128))
    agent, _ = module.train(args)
    obs, begins, act, begin = [], [], agent.act, getattr(agent, "begin", lambda x: None)
    object.__setattr__(agent, "begin", lambda x: (begins.append(x.clone()), begin(x)))
    object.__setattr__(agent, "act", lambda x, deterministic: (obs.append(x), act(x, True))[1])
    module.evaluate(agent, args, 40)
    assert len(begins) == len(obs) > 2
    for first, x in zip(begins, obs):
        assert torch.equal(first.bool(), x.squeeze(-1) == 0)


@pytest.mark.parametrize("name, termination", [("Terminated", 1), ("Truncated", 0), ("Both", 1)])
def test_a_truncation_is_done_but_no_termination(script, module, name, termination):
    obs, next_obs, rewards, terminations, dones, _ = rollout(module, probe(module, name), 4)
    assert (terminations == termination).all() and (dones == 1).all()
    assert (obs == 0).all() and (next_obs == 1).all()


def test_the_last_observation_of_cartpole_is_one_that_ends_it(script, module):
    if "Discrete" not in module.ACTION_SPACES:
        pytest.skip("CartPole has discrete actions")
    obs, next_obs, _, terminations, dones, _ = rollout(module, "CartPole-v1", 40)
    fallen = (next_obs[..., 0].abs() > 2.4) | (next_obs[..., 2].abs() > 12 * 2 * math.pi / 360)
    assert dones.any() and torch.equal(fallen, terminations.bool())
    assert not ((obs[..., 2].abs() > 0.21) | (obs[..., 0].abs() > 2.4)).any()


def test_environments_are_seeded_apart_and_alike_in_every_run(script, module):
    env, starts = some_env(module), []
    for seed in (1, 1, 2):
        envs = module.Envs(env, 3, torch.device("cpu"))
        envs.reset(seed)
        starts.append(envs.obs)
    assert torch.equal(starts[0], starts[1]) and len(starts[0].unique(dim=0)) == 3
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("name, size", [("Dict", 11), ("Tuple", 8), ("DiscreteObs", 7)])
def test_structured_observations_become_flat_float_vectors(script, module, name, size):
    obs, *_ = rollout(module, probe(module, name), 2)
    assert obs.shape == (2, 3, size) and obs.dtype == torch.float32


@pytest.mark.parametrize("name", ["ImageFirst", "ImageLast"])
def test_images_stay_bytes_with_their_channels_first(script, module, name):
    obs, next_obs, *_ = rollout(module, probe(module, name), 7)
    assert obs.shape == (7, 3, 3, 36, 40) and obs.dtype == torch.uint8
    for t in range(7):  # the probe lights one pixel, its row the step
        assert obs[t, 0].nonzero().tolist() == [[1, t % 5, 3]]
        assert next_obs[t, 0].nonzero().tolist() == [[1, t % 5 + 1, 3]]


def test_actions_are_clipped_to_the_bounds_of_each_dimension(script, module):
    if "Box" not in module.ACTION_SPACES:
        pytest.skip("the script takes no Box actions")
    envs = module.Envs("probes:Bounds-v0", 2, torch.device("cpu"))  # which refuses what is outside
    envs.reset(1)
    for actions, executed in [([[-50, -50], [50, 50]], [[-1, 0], [2, 10]]),
                              ([[-50, 4], [0, 50]], [[-1, 4], [0, 10]]),
                              ([[2, 10], [-1, 0]], [[2, 10], [-1, 0]])]:
        rewards = envs.step(torch.tensor(actions, dtype=torch.float))[1]
        assert rewards.tolist() == [sum(action) for action in executed]  # so the probe pays
    halves = module.Envs("probes:Halves-v0", 2, torch.device("cpu"))  # nor what is no half
    halves.reset(1)
    halves.step(torch.tensor([[-50, 50], [0.01, 0.03]], dtype=torch.float))


@pytest.mark.parametrize("fast", [True, False])
def test_atari_rewards_are_raw_and_frames_follow_each_other_where_an_episode_ends(
        script, module, fast, monkeypatch):
    pytest.importorskip("ale_py")
    if "Discrete" not in module.ACTION_SPACES:
        pytest.skip("Atari has discrete actions")
    short = dict(max_num_frames_per_episode=360)
    if fast:  # what is neither filmed nor wrapped
        make_vec = module.gym.make_vec
        monkeypatch.setattr(module.gym, "make_vec", lambda *a, **kw: make_vec(*a, **kw, **short))
    obs, next_obs, rewards, _, dones, envs = rollout(
        module, "ALE/MsPacman-v5", 100, num_envs=2, **{} if fast else short)
    assert isinstance(envs.envs, module.Serial) != fast
    assert obs.shape == (100, 2, 4, 84, 84) and obs.dtype == torch.uint8
    assert rewards.max() == 10  # a dot; clipped it would be 1
    assert dones.any() and len(envs.episodes) == dones.sum()
    assert torch.equal(next_obs[:, :, :3], obs[:, :, 1:])  # a stack of frames moves up by one


def test_atari_shows_the_same_first_frames_whether_it_is_filmed_or_not(script, module):
    pytest.importorskip("ale_py")
    if "Discrete" not in module.ACTION_SPACES:
        pytest.skip("Atari has discrete actions")
    fast, slow = (module.Envs(name, 1, torch.device("cpu"), **options) for name, options in (
        ("ALE/Breakout-v5", {}), ("ale_py:ALE/Breakout-v5", dict(render_mode="rgb_array"))))
    for envs in (fast, slow):
        envs.reset(1)
        for _ in range(4):  # until the ball is served nothing moves
            first, obs = envs.obs, envs.step(torch.zeros(1, dtype=torch.long))[0]
        assert torch.equal(obs[:, -1], obs[:, -2])
    assert torch.equal(fast.obs, slow.obs)
    for envs in (fast, slow):
        envs.reset(1)
    assert torch.equal(fast.obs, slow.obs) and not fast.obs[:, :3].any()


# The command line.


def test_a_run_leaves_its_arguments_metrics_curve_and_checkpoint(script, module, run):
    names = set(os.listdir(run))
    assert names >= {"args.json", "metrics.csv", "learning_curve.png", "checkpoint.pt"}
    assert not [name for name in names if name.endswith(".part")]
    with open("run/args.json") as file:
        assert module.Args(**json.load(file)) == module.Args(**torch.load(
            "run/checkpoint.pt", weights_only=True)["args"])
    rows = table(run)
    assert list(rows[0])[:3] == ["step", "episode_return", "episode_length"] and len(rows[0]) > 3
    assert int(rows[-1]["step"]) >= 512
    with open("run/learning_curve.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_history_of_a_long_run_stays_within_200_rows(script, module):
    settings = small(script, env=some_env(module), total_timesteps=2048, num_envs=1)
    _, history = module.train(module.Args(**settings))
    steps = [row["step"] for row in history]
    assert len(steps) <= 200 and steps == sorted(set(steps)) and steps[-1] >= 2048


def test_evaluate_scores_the_agent_of_a_run(script, module, run, command):
    before = table(run)
    code, out, err = command("--evaluate", run, "--episodes", 5)
    assert (code, err) == (0, "")
    assert ENDING.search(out)[3] == "5" and len(out.splitlines()) == 1
    assert table(run) == before
    saved = module.load(run)
    args = module.Args(**saved["args"])
    envs = module.Envs(args.env, 1, torch.device("cpu"))
    agent = module.Agent(envs.obs_space, envs.action_space, args)
    agent.load_state_dict(saved["agent"])
    assert f"{module.evaluate(agent, args, 5).mean():.1f}" == ENDING.search(out)[1]


def test_video_films_an_episode(script, module, run, command):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    code, out, _ = command("--evaluate", run, "--episodes", 1, "--video")
    assert code == 0 and ENDING.search(out)
    films = [name for name in os.listdir("run/videos") if name.endswith(".mp4")]
    assert films and os.path.getsize(os.path.join("run/videos", films[0])) > 0


def test_without_matplotlib_a_run_lacks_only_its_curve(script, module, command, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = command(*run_flags(script, module), "--episodes", 1)
    assert code == 0 and ENDING.search(out)
    assert "matplotlib" in err and err.count("\n") == 1
    assert "learning_curve.png" not in os.listdir("run") and "checkpoint.pt" in os.listdir("run")


def test_a_finished_run_can_be_resumed_for_more_steps(script, module, run, command):
    code, out, err = command("--resume", run, "--total-timesteps", 1024, "--episodes", 1)
    assert (code, err) == (0, "")
    steps = [int(row["step"]) for row in table(run)]
    assert steps == sorted(set(steps)) and steps[0] < 512 and steps[-1] >= 1024


def test_a_finished_run_can_be_resumed_and_stays_as_it_was(script, module, run, command):
    before, rows = module.load(run), table(run)
    code, out, err = command("--resume", run, "--episodes", 1)
    assert (code, err) == (0, "") and ENDING.search(out)
    assert same(module.load(run)["agent"], before["agent"]) and table(run) == rows


def test_a_resumed_run_takes_a_new_step_size_and_may_come_from_a_gpu(
        script, module, run, command, monkeypatch):
    if script == "cem_es":
        pytest.skip("its optimizer is a function")
    saved, used = torch.load("run/checkpoint.pt", weights_only=True), []
    saved[saved["args"].get("optimizer", "optimizer")]["param_groups"][0]["capturable"] = True
    torch.save(saved, "run/checkpoint.pt")
    for optimizer in (torch.optim.Adam, torch.optim.RMSprop):
        def step(self, step=optimizer.step):
            used.append((float(self.param_groups[0]["lr"]), self.param_groups[0]["capturable"]))
            return step(self)

        monkeypatch.setattr(optimizer, "step", step)
    code, _, err = command("--resume", run, "--total-timesteps", 1024, "--learning-rate", 1e-9,
                           "--episodes", 1)
    assert (code, err) == (0, "")
    assert used and all(rate <= 1.001e-9 and not capturable for rate, capturable in used)


def test_a_checkpoint_of_a_stranger_cannot_run_code(script, module, run, command):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trapped",)

    saved = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save(saved | {"trap": Trap()}, "run/checkpoint.pt")
    assert_one_line(command("--evaluate", run), "run")
    assert not os.path.exists("trapped")


# Errors.


@pytest.mark.parametrize("words, parts", [
    (["--env", "CartPool-v1"], ["CartPool-v1", "CartPole"]),
    (["--env", "NoSuch-v0"], ["NoSuch"]),
    (["--env", "CartPole-v99"], ["CartPole", "v1"]),
    (["--env", "no_such_module:Env-v0"], ["no_such_module"]),
    (["--env", "probes:NoSuch-v0"], ["NoSuch"]),
    (["--env", "probes:Multi-v0"], ["MultiDiscrete"]),
    (["--env", "probes:Integers-v0"], ["integer Box"]),
    (["--num-envs", "0"], ["num_envs", "0"]),
    (["--num-envs", "two"], ["num-envs", "two"]),
    (["--gamma", "1.5"], ["gamma", "1.5"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--device", "no_such_device"], ["no_such_device"]),
    (["--device", "meta"], ["meta"]),
    (["--resume", "no_such_folder"], ["no_such_folder"]),
    (["--resume", ""], ["no checkpoint"]),  # as of a shell's variable that is not set
    (["--evaluate", ""], ["no checkpoint"]),
    (["--resume", "one", "--evaluate", "another"], ["--resume", "--evaluate"]),
    (["--run-dir", "a" * 300], ["aaa"]),
    (["--env", "probes:Sequence-v0"], ["Sequence-v0"]),
    (["--evaluate", "no_such_folder"], ["no_such_folder"]),
    (["--episodes", "0"], ["episodes"]),
])
def test_a_mistake_gives_one_line_that_names_it(script, module, command, words, parts, tmp_path):
    defaults = run_flags(script, module) if words[0] not in ("--resume", "--evaluate") else []
    assert_one_line(command(*defaults, *words), f"{script}.py: ", *parts)
    assert not os.path.exists("run/checkpoint.pt")


def test_a_device_that_is_not_there_gives_one_line(script, module, command):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_one_line(command(*run_flags(script, module, device="cuda")), "cuda")


def test_a_module_that_exits_when_it_is_imported_gives_one_line(script, module, command, tmp_path):
    (tmp_path / "quits.py").write_text("raise SystemExit")
    assert_one_line(command(*run_flags(script, module, env="quits:Env-v0")), "quits.py", "Exit")
    assert not os.path.exists("run/checkpoint.pt")


def test_an_action_space_that_it_cannot_take_names_the_scripts_that_can(script, module, command):
    for kind in {"Discrete", "Box"} - set(module.ACTION_SPACES):
        assert_one_line(command("--env", ENVS[kind]), kind, "ppo")


def test_a_run_folder_that_cannot_be_written_gives_one_line(script, module, command, tmp_path):
    (tmp_path / "file").touch()
    assert_one_line(command(*run_flags(script, module, run_dir="file/run")), "file/run")


def test_a_run_is_not_written_over(script, module, run, command):
    before = module.load(run)
    assert_one_line(command(*run_flags(script, module, seed=2)), "run")
    assert same(module.load(run), before)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_damaged_foreign_or_incomplete_checkpoint_gives_one_line(
        script, module, run, command, flag):
    whole = open("run/checkpoint.pt", "rb").read()
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        with open("run/checkpoint.pt", "wb") as file:
            file.write(whole[:size])
        assert_one_line(command(flag, run), "run")
    torch.save(saved | {"script": "other"}, "run/checkpoint.pt")
    assert_one_line(command(flag, run), "other.py", f"{script}.py")
    for wrong in ([1, 2], {"weights": torch.zeros(1)}):
        torch.save(wrong, "run/checkpoint.pt")
        assert_one_line(command(flag, run), "run")
    os.remove("run/checkpoint.pt")
    assert_one_line(command(flag, run), "run")


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_settings_that_do_not_fit_the_checkpoint_give_one_line(script, module, run, command, flag):
    sizes = [field.name for field in dataclasses.fields(module.Args) if field.name == "hidden_size"]
    for name in sizes:
        assert_one_line(command(flag, run, "--" + name.replace("_", "-"), 7), "run")


@pytest.mark.parametrize("name, parts", [
    ("Raises", ["Raises-v0", "the probe"]), ("NaNReward", ["NaNReward-v0", "nan"]),
    ("Misshapen", ["Misshapen-v0", "shape"])])
def test_an_environment_that_fails_in_the_middle_gives_one_line_and_keeps_the_checkpoint(
        script, module, command, name, parts):
    words = run_flags(script, module, env=probe(module, name), checkpoint_every=64)
    assert_one_line(command(*words), *parts)
    saved = module.load("run")
    assert 0 < saved["step"] < 512
    assert all(value.isfinite().all() for value in saved["agent"].values())


def test_training_that_diverges_stops_with_code_1_and_keeps_the_last_finite_checkpoint(
        script, module, command):
    # The environments must not be blamed for what a diverged policy does to them.
    envs = [ENVS[kind] for kind in takes(module, "Discrete", "Box")]
    rare = dict(total_timesteps=512_000), dict(checkpoint_every=512)  # what looks at the numbers
    often = dict(total_timesteps=512), dict(checkpoint_every=1)
    choices = itertools.product(envs, DIVERGENT[script], *zip(rare, often))
    for number, (env, settings, rows, checkpoints) in enumerate(choices):
        folder = f"run{number}"
        changes = dict(env=env, run_dir=folder) | settings | rows | checkpoints
        assert_one_line(command(*run_flags(script, module, **changes)), f"{script}.py: ", code=1)
        saved = module.load(folder)
        assert all(value.isfinite().all() for value in saved["agent"].values())
        rows = table(folder) if os.path.exists(f"{folder}/metrics.csv") else []
        assert all(math.isfinite(float(value)) for row in rows for name, value in row.items()
                   if not name.startswith("episode_"))  # no episode may have ended as yet


# Reliability.


def start(script, tmp_path, *words, bomb=None):
    words = *words, *(() if "--episodes" in words else ("--episodes", 1))
    return processes.Script(ROOT / f"{script}.py", *words, folder=tmp_path, bomb=bomb)


def wait_for(condition, process):
    """Until the condition holds or the process ends."""
    while process.is_alive() and not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("env", ["CartPole-v1", "InvertedPendulum-v5"])
def test_a_run_killed_anywhere_and_resumed_is_the_run_that_never_stopped(
        script, module, env, tmp_path):
    if {"CartPole-v1": "Discrete", "InvertedPendulum-v5": "Box"}[env] not in module.ACTION_SPACES:
        pytest.skip("the script does not take its actions")
    settings = small(script, env=env, total_timesteps=4096, checkpoint_every=512)
    whole = flags(settings | {"run_dir": "whole"})
    assert start(script, tmp_path, *whole).end()[0] == 0

    dice = random.Random(env)
    bombs = [functools.partial(processes.die_in_step, dice.randint(150, 350)),
             functools.partial(processes.die_in_save, 2),
             functools.partial(processes.die_in_rename, dice.randint(2, 9)),
             functools.partial(processes.die_in_step, dice.randint(1, 250)),
             None, None]  # here the kill comes from outside, at no particular moment
    steps = []
    for bomb in bombs:
        exists = (tmp_path / "part/checkpoint.pt").exists()
        words = ["--resume", "part"] if exists else flags(settings | {"run_dir": "part"})
        began = os.stat(tmp_path / "part/checkpoint.pt").st_mtime_ns if exists else 0
        process = start(script, tmp_path, *words, bomb=bomb)
        if bomb is None:
            wait_for(lambda: os.stat(tmp_path / "part/checkpoint.pt").st_mtime_ns > began, process)
            time.sleep(dice.uniform(0, 0.05))
            process.kill()
        code, _, err = process.end()
        assert code == -signal.SIGKILL or (bomb is None and code == 0), err
        steps.append(module.load(tmp_path / "part")["step"])
    assert steps == sorted(steps) and 0 < steps[0] and steps[2] < 4096

    code, out, err = start(script, tmp_path, "--resume", "part").end()
    assert (code, err) == (0, "")
    saved, expected = module.load(tmp_path / "part"), module.load(tmp_path / "whole")
    assert same(saved["agent"], expected["agent"])
    assert table(tmp_path / "part") == table(tmp_path / "whole")
    assert same(timeless(saved["history"]), timeless(expected["history"]))
    for name in expected.keys() - {"args", "history", "seconds"}:  # the optimizer above all
        assert same(saved[name], expected[name]), name
    assert len(table(tmp_path / "part")) > 10


def a_signal(script):
    """Ctrl-C for every other script and SIGTERM for the rest, and the exit codes."""
    return [(signal.SIGINT, 130), (signal.SIGTERM, 143)][SCRIPTS.index(script) % 2]


def test_a_signal_saves_and_stops_and_the_run_can_go_on(script, module, tmp_path):
    number, expected = a_signal(script)
    words = flags(small(script, env=some_env(module), total_timesteps=1_000_000, run_dir="run"))
    process = start(script, tmp_path, *words)
    wait_for(lambda: (tmp_path / "run/metrics.csv").exists(), process)
    os.kill(process.pid, number)
    code, _, err = process.end()
    assert code == expected, err
    assert err.count("\n") == 1 and "--resume run" in err
    saved = module.load(tmp_path / "run")
    # It stopped between checkpoints, and what it had learnt until then is kept.
    assert 0 < saved["step"] < 1_000_000 and saved["step"] == saved["history"][-1]["step"] or (
        saved["step"] > saved["history"][-1]["step"])
    more = saved["step"] + 2000
    code, _, err = start(script, tmp_path, "--resume", "run", "--total-timesteps", more).end()
    assert (code, err) == (0, "") and int(table(tmp_path / "run")[-1]["step"]) >= more


def test_a_signal_during_the_final_evaluation_stops_it(script, module, tmp_path):
    number, expected = a_signal(script)
    words = flags(small(script, env=some_env(module), run_dir="run"))
    process = start(script, tmp_path, *words, "--episodes", 10**7)
    wait_for(lambda: (tmp_path / "run/learning_curve.png").exists(), process)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.join(10)
    assert not process.is_alive(), process.kill()
    assert process.exitcode in (expected, -number)
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_a_run_that_was_killed_before_it_learnt_anything_can_be_scored_and_resumed(
        script, module, tmp_path, command):
    words = run_flags(script, module)
    bomb = functools.partial(processes.die_in_step, 2)
    assert start(script, tmp_path, *words, bomb=bomb).end()[0] == -signal.SIGKILL
    assert module.load(tmp_path / "run")["step"] == 0
    code, out, err = command("--evaluate", "run", "--episodes", 3)
    assert (code, err) == (0, "") and ENDING.search(out)
    code, out, err = command("--resume", "run", "--episodes", 3)
    assert (code, err) == (0, "") and ENDING.search(out)


# Several processes.


def test_two_processes_train_one_agent_on_different_environments(script, module, tmp_path):
    """Both must end with the same weights to the last bit, and write one run."""
    settings = small(script, env=some_env(module), run_dir=str(tmp_path / "run"))
    (tmp_path / "driver.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import {script} as module

seeds, reset = [], module.Envs.reset
module.Envs.reset = lambda self, seed: (seeds.append(seed), reset(self, seed))[1]
agent, history = module.train(module.Args(**{settings!r}))
torch.save((agent.state_dict(), seeds, history[-1]["step"]), "end.pt")
torch.distributed.barrier()
sys.stdout.flush(), os._exit(0)  # as main() ends
""")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ends = []
    for rank in (0, 1):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        join = functools.partial(processes.join, rank, port)
        ends.append(processes.Script(tmp_path / "driver.py", folder=folder, bomb=join))
    (code, out, err), (other_code, other_out, other_err) = (process.end() for process in ends)
    assert code == other_code == 0, err + other_err
    (a, seeds, steps), (b, other_seeds, other_steps) = (
        torch.load(tmp_path / f"rank{rank}/end.pt", weights_only=True) for rank in (0, 1))
    assert same(a, b) and steps == other_steps >= 512
    assert len(seeds) == len(other_seeds) and not set(seeds) & set(other_seeds)
    assert same(module.load(tmp_path / "run")["agent"], a)
    assert out and not other_out  # only one of them speaks


def test_torchrun_starts_a_script_as_the_readme_says(tmp_path):
    words = flags(small("ppo", env="CartPole-v1", run_dir="run"))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                  ROOT / "ppo.py", *words, "--episodes", 3, cwd=tmp_path,
                  env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(ENDING.findall(done.stdout)) == 1 and ENDING.search(done.stdout)[3] == "3"
    assert (tmp_path / "run/learning_curve.png").exists()


def test_a_rank_without_other_processes_silences_nothing():
    alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = python("-c", "import ppo; print(ppo.RANK)", cwd=ROOT, env=alone | {"RANK": "1"})
    assert done.stdout == "0\n", done.stderr

"""What every script promises: form, settings, training, command line, errors, reliability.

The plumbing is one text in all scripts: its tests run on ppo and ddpg, or with --all on all."""
import ast
import csv
import dataclasses
import functools
import gc
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
import types

import gymnasium as gym
import numpy as np
import probes
import processes
import pytest
import torch
import torch.nn.utils.prune
from conftest import (
    BLIND, BOUNDED, DIVERGENT, ENVS, KINDS, NAMES, ROOT, SCRIPTS, TESTS, flags, same, small, takes,
    timeless)

BANNER = re.compile(r"^# =+ Plumbing\n", re.MULTILINE)
ALLOWED_IMPORTS = {*sys.stdlib_module_names, "numpy", "torch", "gymnasium"}
ENDING = re.compile(r"return (-?[\d.]+) \+/- ([\d.]+) over (\d+) episodes")
FINISHED = {}  # the folder of a finished run of each script, to be copied


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
def run(script, module, command, tmp_path_factory):
    """A finished run in the folder `run`. It is made once, by the command line."""
    if script not in FINISHED:
        code, out, err = command(*run_flags(script, module), "--episodes", 2)
        assert (code, err) == (0, ""), err
        last = out.splitlines()[-1]
        assert ENDING.search(last)[3] == "2" and int(re.search(r"(\d+) steps in", last)[1]) >= 512
        FINISHED[script] = tmp_path_factory.mktemp(script)
        shutil.copytree("run", FINISHED[script], dirs_exist_ok=True)
    shutil.copytree(FINISHED[script], "run", dirs_exist_ok=True)
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
        if ast.unparse(node) == "train = clean_up()(train)":
            continue
        if isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target)
                     if isinstance(name, ast.Name)]
            assert all(name.id.isupper() for name in names), ast.unparse(node)  # constants
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)), (
                ast.unparse(node))
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert names >= {"Args", "Agent", "train", "evaluate", "load_agent", "main"}


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


def test_a_given_setting_beats_the_preset_which_beats_the_default(script, module):
    defaults = {field.name: field.default for field in dataclasses.fields(module.Args)}
    assert module.PRESETS
    for pattern, preset in module.PRESETS.items():
        env = pattern.replace("*", "Pong-v5")
        assert vars(module.Args(env=env)) == defaults | preset | {"env": env}
        assert vars(module.Args(**defaults | {"env": env})) == defaults | {"env": env}
    assert vars(module.Args(env="Other-v0")) == defaults | {"env": "Other-v0"}


@pytest.mark.plumbing
def test_a_flag_beats_the_preset_and_the_run_says_which_settings_it_uses(
        script, module, command, monkeypatch):
    env, name = some_env(module), fraction(module)
    monkeypatch.setitem(module.PRESETS, env, {name: 0.5, "threads": 2})
    words = run_flags(script, module, **{"env": env, name: 0.75, "total_timesteps": 64})
    code, out, _ = command(*words, "--episodes", 1)
    with open("run/args.json") as file:
        saved = json.load(file)
    assert code == 0 and (saved[name], saved["threads"]) == (0.75, 2)
    first = out.splitlines()[0]
    assert f"'{name}': 0.75" in first and "'threads': 2" in first and "tau" not in first


def test_a_whole_number_may_be_written_with_an_exponent(script, module):
    assert module.Args(total_timesteps=1e5) == module.Args(total_timesteps="100000")
    assert type(module.Args(total_timesteps=1e5).total_timesteps) is int
    with pytest.raises(module.UserError, match="total_timesteps is '?1.5"):
        module.Args(total_timesteps="1.5")


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


def test_settings_can_be_copied_with_changes(script, module):
    args = module.Args(seed=3, num_envs=2)
    assert dataclasses.replace(args, seed=4) == module.Args(**vars(args) | {"seed": 4})


# Training.


def check_space(script, module, kind, env):
    """Train and evaluate on the environment, or see that it is refused with good reason."""
    if kind not in module.ACTION_SPACES:
        with pytest.raises(module.UserError, match=f"{kind}.*ppo takes"):
            module.VecEnv(env, 2, torch.device("cpu"))
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


@pytest.mark.parametrize("kind, env", [
    ("Discrete", "probes:Structured-v0"), ("Discrete", "probes:ImageLast-v0"),
    ("Box", "probes:BoxDict-v0"), ("Box", "probes:BoxImage-v0"), ("Box", "probes:Unbounded-v0")])
def test_the_main_kinds_of_spaces_train_and_act(script, module, kind, env):
    check_space(script, module, kind, env)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind, env", [(kind, env) for kind, envs in KINDS.items() for env in envs])
def test_every_kind_of_space_trains_and_acts(script, module, kind, env):
    check_space(script, module, kind, env)


def test_saving_never_touches_the_training_and_one_seed_gives_one_run(script, module, run):
    seldom = module.load_checkpoint(run)
    settings = small(script, env=some_env(module))
    for changes in dict(), dict(checkpoint_every=1, run_dir="often"):
        agent, history = module.train(module.Args(**settings, **changes))
        assert same(timeless(history), timeless(seldom["history"]))
        assert same(agent.state_dict(), seldom["agent"])
    assert same(module.load_checkpoint("often")["agent"], seldom["agent"])
    other, _ = module.train(module.Args(**settings | {"seed": 2}))
    assert not same(other.state_dict(), seldom["agent"])


def test_an_episode_longer_than_the_time_between_checkpoints_ends(script, module):
    if script in ("reinforce", "cem_es"):
        pytest.skip("it plays whole episodes between checkpoints")
    settings = small(script, env=probe(module, "Long"), checkpoint_every=16, run_dir="run")
    _, history = module.train(module.Args(**settings))
    assert history[-1]["episode_length"] == 40


@pytest.mark.plumbing
def test_training_and_evaluation_meet_other_episodes_and_so_do_other_seeds(
        script, module, monkeypatch):
    reset, phases = module.VecEnv.reset, []
    monkeypatch.setattr(module.VecEnv, "reset", lambda self, seed: (
        phases[-1].update(np.atleast_1d(seed).tolist()), reset(self, seed))[1])
    for seed in (1, 2):
        args = module.Args(**small(script, env=some_env(module), seed=seed, total_timesteps=64,
                                   run_dir=f"run{seed}"))
        phases.append(set())
        agent, _ = module.train(args)
        phases.append(set())
        module.train(dataclasses.replace(args, total_timesteps=args.total_timesteps + 256),
                     resume=args.run_dir)
        phases.append(set())
        module.evaluate(agent, args, 20)
    assert all(phases) and len(phases) == 6
    for a, b in itertools.combinations(phases, 2):
        assert not a & b - {None}  # which is no new seed


def process_state():
    """What a library call must leave as it was."""
    return dict(
        random=random.getstate(), numpy=tuple(map(str, np.random.get_state())),
        torch=torch.get_rng_state(), threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(), dtype=str(torch.get_default_dtype()),
        gc=(gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()),
        signals=[signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        path=list(sys.path), folder=os.getcwd(), environ=dict(os.environ))


def test_a_library_call_leaves_the_process_as_it_was_and_writes_nothing(
        script, module, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    monkeypatch.delattr(os, "sysconf")  # Windows has none
    files = sorted(tmp_path.rglob("*"))
    args = module.Args(**small(script, env=some_env(module), total_timesteps=128))
    random.seed(5), np.random.seed(6), torch.manual_seed(7), torch.set_num_threads(2)
    try:
        before = process_state()
        agent, history = module.train(args)
        assert same(process_state(), before)
        module.evaluate(agent, args, 2)
        assert same(process_state(), before)
        module.load_agent(run)
        assert same(process_state(), before)
        with pytest.raises(RuntimeError):
            module.train(dataclasses.replace(args, env=probe(module, "Raises"), num_envs=1,
                                             total_timesteps=512))
        assert same(process_state(), before)
    finally:
        torch.set_num_threads(1)
    assert sorted(tmp_path.rglob("*")) == files
    assert isinstance(agent, torch.nn.Module) and isinstance(history[-1]["episode_return"], float)


def test_an_environment_that_never_ends_can_be_trained_on(script, module):
    if script == "reinforce":
        pytest.skip("it learns from whole episodes; test_reinforce.py tests what it says then")
    agent, history = module.train(module.Args(**small(script, env=probe(module, "Endless"))))
    assert history[-1]["step"] >= 512
    if script == "cem_es":  # it cuts episodes off, which is then their end
        assert {row["episode_return"] for row in history} == {16.0}
    else:
        assert math.isnan(history[-1]["episode_return"])
    assert all(value.isfinite().all() for value in agent.state_dict().values())


@pytest.mark.parametrize("name", ["NaNEnd", pytest.param("InfEnd", marks=pytest.mark.exhaustive)])
def test_an_observation_behind_a_termination_does_not_count(script, module, name):
    if script == "mbrl_mpc":
        pytest.skip("its model learns what follows every action")
    args = module.Args(**small(script, env=probe(module, name)))
    agent, history = module.train(args)
    assert history[-1]["step"] >= 512
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    assert (module.evaluate(agent, args, 2) == 5).all()


def networks(agent):
    """The linear layers of an agent, by name."""
    return {name: layer for name, layer in agent.named_modules() if isinstance(
        layer, torch.nn.Linear)}


def test_forward_hooks_of_all_layers_fire_whenever_they_are_used(script, module, monkeypatch):
    called, products, linear = [], [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (
        products.append(1), linear(*args))[1])
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda layer, inputs, output: called.append(layer))
    try:
        args = module.Args(**small(script, env=some_env(module), total_timesteps=128))
        if script == "mbrl_mpc":  # only this planner has an actor
            args = dataclasses.replace(args, env=ENVS["Box"], planner="policy")
        agent, _ = module.train(args)
        module.evaluate(agent, args, 1)
    finally:
        hook.remove()
    assert [name for name, layer in networks(agent).items() if layer not in called] == []
    assert len([layer for layer in called if isinstance(layer, torch.nn.Linear)]) == len(products)


def test_pruned_layers_act_pruned(script, module):
    args = module.Args(**small(script, env=some_env(module)))
    envs = module.VecEnv(args.env, 3, torch.device("cpu"))
    agent = module.Agent(envs.obs_space, envs.action_space, args)
    layers = networks(agent).values()
    if not layers:
        pytest.skip("it has no linear layers")
    outputs = []
    for layer in layers:
        torch.nn.utils.prune.identity(layer, "weight")
        layer.weight_mask.zero_()  # after pruning, so that only a hook can see it
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(
            (layer, output.clone())))  # an activation may overwrite it
    obs = torch.randn(3, *envs.obs_space.shape)
    if hasattr(agent, "reset"):
        agent.reset(torch.ones(3))
    agent.act(obs, deterministic=True)
    for layer, output in outputs:
        assert torch.equal(output, layer.bias.expand_as(output))
    assert outputs or script == "mbrl_mpc"


def test_the_agent_acts_without_gradients_and_deterministic_actions_are_no_draws(script, module):
    args = module.Args(**small(script, env=some_env(module)))
    envs = module.VecEnv(args.env, 3, torch.device("cpu"))
    agent = module.Agent(envs.obs_space, envs.action_space, args)
    envs.reset(1)
    actions = []
    for _ in range(2):
        if hasattr(agent, "reset"):  # an old plan is no part of the policy
            agent.reset(torch.ones(3))
        actions.append(agent.act(envs.obs, deterministic=True))
    first, second = actions
    assert len(first) == 3 and not first.requires_grad and torch.equal(first, second)


# Evaluation.


@pytest.fixture
def loaded(module, run):
    """The agent of a finished run, and its Args."""
    return module.load_agent(run)


def test_load_agent_gives_the_agent_that_was_saved(script, module, run, loaded):
    agent, args = loaded
    saved = module.load_checkpoint(run)
    assert same(agent.state_dict(), saved["agent"]) and vars(args) == saved["args"]
    assert module.load_agent(run, seed=7)[1].seed == 7
    if script != "cem_es":
        assert "agent" in saved and len(saved["agent"]) > 2


@pytest.mark.plumbing
def test_the_same_evaluation_scores_the_same_and_each_episode_counts_once(module, loaded):
    returns = [module.evaluate(*loaded, 25) for _ in range(2)]
    assert returns[0].shape == (25,) and (returns[0] == returns[1]).all()
    assert len(set(returns[0])) > 1


@pytest.mark.plumbing
def test_evaluation_acts_deterministically_and_does_not_prefer_short_episodes(
        script, module, monkeypatch):
    args = module.Args(**small(script, env=probe(module, "Uneven"), total_timesteps=128))
    agent, _ = module.train(args)
    act, modes = module.Agent.act, []
    monkeypatch.setattr(module.Agent, "act", lambda self, obs, deterministic=False: (
        modes.append(deterministic), act(self, obs, deterministic))[1])
    returns = module.evaluate(agent, args, 400)
    assert all(modes) and modes
    assert returns.mean() == pytest.approx(5, abs=0.8)  # episodes of 1 and of 9, four std


@pytest.mark.plumbing
@pytest.mark.parametrize("episodes, mean", [(40, 50.5), (30, 34)])
def test_evaluation_plays_equally_many_episodes_everywhere_and_stops(
        script, module, monkeypatch, episodes, mean):
    args = module.Args(**small(script, env=probe(module, "Counter"), total_timesteps=64))
    agent, _ = module.train(args)
    monkeypatch.setattr(probes.Alternating, "made", 0)  # ten end at once, ten after 100 steps
    monkeypatch.setattr(probes.Alternating, "total_steps", 0)
    args.env = probe(module, "Alternating")
    returns = module.evaluate(agent, args, episodes)
    assert probes.Alternating.total_steps == 20 * 200
    assert len(returns) == episodes and (returns == 1).sum() == (returns == 100).sum()


def test_a_long_evaluation_says_each_minute_where_it_is(capsys, monkeypatch):
    import ppo
    args = ppo.Args(**small("ppo", env=probe(ppo, "Counter"), total_timesteps=64))
    agent, _ = ppo.train(args)
    lines = [f"evaluation: {done} of 40 episodes\n" for done in (0, 20)]
    for steps, lines in (59, []), (124, lines):  # of a second each
        capsys.readouterr()
        seconds = itertools.count()
        monkeypatch.setattr(ppo.time, "time", lambda: next(seconds))
        ppo.evaluate(agent, args, 40, length=steps // 2)
        assert capsys.readouterr().out == "".join(lines)


@pytest.mark.plumbing("mbrl_mpc")
def test_evaluation_tells_an_agent_with_a_reset_where_episodes_begin(script, module):
    args = module.Args(**small(script, env=probe(module, "Uneven"), total_timesteps=128))
    agent, _ = module.train(args)
    obs, starts, act, reset = [], [], agent.act, getattr(agent, "reset", lambda x: None)
    object.__setattr__(agent, "reset", lambda x: (starts.append(x.clone()), reset(x)))
    object.__setattr__(agent, "act", lambda x, deterministic: (obs.append(x), act(x, True))[1])
    module.evaluate(agent, args, 40)
    assert len(starts) == len(obs) > 2
    for first, x in zip(starts, obs):
        assert torch.equal(first.bool(), x.squeeze(-1) == 0)


@pytest.mark.plumbing
def test_evaluation_passes_arguments_and_wrappers_to_the_environment(module, loaded):
    agent, args = loaded
    double = functools.partial(gym.wrappers.TransformReward, func=lambda reward: 2 * reward)
    returns = module.evaluate(agent, args, 3, max_episode_steps=4)
    assert (2 * returns == module.evaluate(
        agent, args, 3, max_episode_steps=4, wrappers=[double])).all()
    if args.env == "CartPole-v1":
        assert (returns == 4).all()


# Environments.


def rollout(module, env, steps, num_envs=3, **kwargs):
    """(obs, next_obs, rewards, terminations, dones) of each step, and the VecEnv."""
    envs = module.VecEnv(env, num_envs, torch.device("cpu"), **kwargs)
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


@pytest.mark.plumbing
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


@pytest.mark.plumbing
def test_next_obs_keeps_fractions_where_the_next_episode_begins_with_whole_numbers(script, module):
    env = probe(module, "WholeFirst")
    obs, next_obs, *_ = rollout(module, env, 6, num_envs=1)
    assert obs.flatten().tolist() == [0, 0.5, 1] * 2
    assert next_obs.flatten().tolist() == [0.5, 1, 1.5] * 2


@pytest.mark.plumbing
def test_the_environments_say_where_an_episode_begins(script, module):
    envs = module.VecEnv(probe(module, "Uneven"), 5, torch.device("cpu"))  # episodes of 1 and 9
    envs.reset(1)
    starts = []
    for _ in range(30):
        assert torch.equal(envs.episode_starts.bool(), envs.obs.squeeze(-1) == 0)
        starts.append(envs.episode_starts)
        envs.step(zeros(envs))
    assert 0 < torch.stack(starts[1:]).mean() < 1


@pytest.mark.plumbing
@pytest.mark.parametrize("name, termination", [("Terminated", 1), ("Truncated", 0), ("Both", 1)])
def test_a_truncation_is_done_but_no_termination(script, module, name, termination):
    obs, next_obs, rewards, terminations, dones, _ = rollout(module, probe(module, name), 4)
    assert (terminations == termination).all() and (dones == 1).all()
    assert (obs == 0).all() and (next_obs == 1).all()


@pytest.mark.plumbing(kind="Discrete")
def test_the_last_observation_of_cartpole_is_one_that_ends_it(script, module):
    obs, next_obs, _, terminations, dones, _ = rollout(module, "CartPole-v1", 40)
    fallen = (next_obs[..., 0].abs() > 2.4) | (next_obs[..., 2].abs() > 12 * 2 * math.pi / 360)
    assert dones.any() and torch.equal(fallen, terminations.bool())
    assert not ((obs[..., 2].abs() > 0.21) | (obs[..., 0].abs() > 2.4)).any()


@pytest.mark.plumbing
def test_environments_are_seeded_apart_and_alike_in_every_run(script, module):
    env, starts = some_env(module), []
    for seed in (1, 1, 2):
        envs = module.VecEnv(env, 3, torch.device("cpu"))
        envs.reset(seed)
        starts.append(envs.obs)
    assert torch.equal(starts[0], starts[1]) and len(starts[0].unique(dim=0)) == 3
    assert not torch.equal(starts[0], starts[2])
    envs.reset([7, 7, 8])
    assert torch.equal(envs.obs[0], envs.obs[1]) and not torch.equal(envs.obs[0], envs.obs[2])


@pytest.mark.plumbing
@pytest.mark.parametrize("name, size", [("Dict", 11), ("Tuple", 8), ("DiscreteObs", 7)])
def test_structured_observations_become_flat_float_vectors(script, module, name, size):
    obs, *_, envs = rollout(module, probe(module, name), 2)
    assert obs.shape == (2, 3, size) and obs.dtype == torch.float32
    assert envs.obs_space.shape == (size,) and envs.obs_space.dtype == np.float32


@pytest.mark.plumbing
@pytest.mark.parametrize("name", ["ImageFirst", "ImageLast"])
def test_images_stay_bytes_with_their_channels_first(script, module, name):
    obs, next_obs, *_, envs = rollout(module, probe(module, name), 7)
    assert obs.shape == (7, 3, 3, 36, 40) and obs.dtype == torch.uint8
    assert envs.obs_space.shape == (3, 36, 40) and envs.obs_space.dtype == np.uint8
    for t in range(7):  # the probe lights one pixel, its row is the step
        assert obs[t, 0].nonzero().tolist() == [[1, t % 5, 3]]
        assert next_obs[t, 0].nonzero().tolist() == [[1, t % 5 + 1, 3]]


@pytest.mark.plumbing(kind="Box")
def test_actions_are_clipped_to_the_bounds_of_each_dimension(script, module):
    envs = module.VecEnv("probes:Bounds-v0", 2, torch.device("cpu"))  # it refuses others
    envs.reset(1)
    for actions, executed in [([[-50, -50], [50, 50]], [[-1, 0], [2, 10]]),
                              ([[-50, 4], [0, 50]], [[-1, 4], [0, 10]]),
                              ([[2, 10], [-1, 0]], [[2, 10], [-1, 0]])]:
        rewards = envs.step(torch.tensor(actions, dtype=torch.float))[1]
        assert rewards.tolist() == [sum(action) for action in executed]  # so the probe pays
    halves = module.VecEnv("probes:Halves-v0", 2, torch.device("cpu"))  # and half precision
    halves.reset(1)
    halves.step(torch.tensor([[-50, 50], [0.01, 0.03]], dtype=torch.float))


@pytest.mark.plumbing(kind="Discrete")
def test_executed_actions_are_members_of_a_space_that_begins_at_minus_one(script, module):
    envs = module.VecEnv("probes:Start-v0", 3, torch.device("cpu"))  # it refuses others
    envs.reset(1)
    for action in range(3):
        envs.step(torch.full((3,), action))
    with pytest.raises(AssertionError, match="is not in"):
        envs.step(torch.full((3,), 3))


@pytest.mark.plumbing
@pytest.mark.filterwarnings("ignore:overflow")
def test_an_observation_that_is_not_finite_passes_only_behind_a_termination(script, module):
    obs, next_obs, _, terminations, *_ = rollout(module, probe(module, "NaNEnd"), 12)
    assert torch.equal(next_obs.isnan().squeeze(-1), terminations > 0) and obs.isfinite().all()
    for name in "NaNObs", "NaNFirst", "NaNCut", "NaNReward", "HugeReward":
        with pytest.raises(module.UserError, match=f"{name}-v0 gave .*(nan|inf)"):
            rollout(module, probe(module, name), 80)


@pytest.mark.plumbing
def test_a_wrong_shape_is_refused_in_one_of_many_environments_and_at_a_reset(script, module):
    envs = module.VecEnv(probe(module, "Counter"), 3, torch.device("cpu"))
    envs.reset(1)
    inner = envs.envs.envs[1].unwrapped
    inner.fail, inner.fail_after = lambda obs, reward: (np.zeros((1, 1), np.float32), reward), 0
    with pytest.raises(module.UserError, match=r"shape \(1,\), but gave {\(1, 1\)}"):
        envs.step(zeros(envs))
    inner.reset = lambda **kwargs: (np.zeros(2, np.float32), {})
    with pytest.raises(ValueError):
        envs.reset(1)


@pytest.mark.plumbing(kind="Discrete")
@pytest.mark.parametrize("fast", [
    pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_atari_rewards_are_raw_and_frames_follow_each_other_where_an_episode_ends(
        script, module, fast, monkeypatch):
    pytest.importorskip("ale_py")
    short = dict(max_num_frames_per_episode=360)
    if fast:  # what is neither filmed nor wrapped
        make_vec = module.gym.make_vec
        monkeypatch.setattr(module.gym, "make_vec", lambda *a, **kw: make_vec(*a, **kw, **short))
    obs, next_obs, rewards, _, dones, envs = rollout(
        module, "ALE/MsPacman-v5", 100, num_envs=2, **{} if fast else short)
    assert isinstance(envs.envs, module.SyncVectorEnv) != fast
    assert obs.shape == (100, 2, 4, 84, 84) and obs.dtype == torch.uint8
    assert rewards.max() == 10  # a dot; clipped it would be 1
    assert dones.any() and len(envs.episodes) == dones.sum()
    assert torch.equal(next_obs[:, :, :3], obs[:, :, 1:])  # a stack of frames moves up by one


@pytest.mark.plumbing(kind="Discrete")
def test_atari_shows_the_same_first_frames_whether_it_is_filmed_or_not(script, module):
    pytest.importorskip("ale_py")
    fast, slow = (module.VecEnv(name, 1, torch.device("cpu"), **options) for name, options in (
        ("ALE/Breakout-v5", {}), ("ale_py:ALE/Breakout-v5", dict(render_mode="rgb_array"))))
    for envs in (fast, slow):
        envs.reset(1)
        for _ in range(4):  # until the ball is served nothing moves
            obs = envs.step(torch.zeros(1, dtype=torch.long))[0]
        assert torch.equal(obs[:, -1], obs[:, -2])
    assert torch.equal(fast.obs, slow.obs)
    for envs in (fast, slow):
        envs.reset(1)
    assert torch.equal(fast.obs, slow.obs) and not fast.obs[:, :3].any()


@pytest.mark.plumbing
def test_environments_are_closed_by_those_who_open_them(script, module, command, monkeypatch):
    monkeypatch.setattr(probes.Single, "opened", 0)
    settings = small(script, env=probe(module, "Single"), num_envs=1, total_timesteps=64)
    args = module.Args(**settings, run_dir="run")
    for k in range(2):
        agent, _ = module.train(dataclasses.replace(args, run_dir=f"run{k}"))
        assert probes.Single.opened == 0
        module.evaluate(agent, args, 1)
        assert probes.Single.opened == 0
    code, _, err = command("--evaluate", "run0", "--episodes", 1)
    assert (code, err, probes.Single.opened) == (0, "", 0)
    code, _, err = command(*flags(settings), "--run-dir", "run2", "--episodes", 1)
    assert (code, err, probes.Single.opened) == (0, "", 0)


@pytest.mark.plumbing
def test_environments_are_closed_after_an_error(script, module, monkeypatch):
    monkeypatch.setattr(probes.Single, "opened", 0)
    for env in probe(module, "SingleRaises"), "probes:SingleMulti-v0":
        settings = small(script, env=env, num_envs=1)
        with pytest.raises((RuntimeError, module.UserError), match="broke|MultiDiscrete"):
            module.train(module.Args(**settings))
        assert probes.Single.opened == 0
    with pytest.raises(RuntimeError, match="another one is open"):  # so the probe notices
        module.train(module.Args(**small(script, env=probe(module, "Single"), num_envs=2)))
    assert probes.Single.opened == 0


@pytest.mark.plumbing
def test_an_environment_that_does_not_close_costs_no_score(script, module, tmp_path):
    words = flags(small(script, env=probe(module, "Unclosable"), num_envs=1, total_timesteps=64))
    find = functools.partial(processes.find, str(TESTS))
    code, out, err = start(script, tmp_path, *words, bomb=find).end()
    assert code == 0 and ENDING.search(out.splitlines()[-1])[1] == "5.0"
    assert "Traceback" not in err


@pytest.mark.plumbing
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


# The command line.


def test_a_run_leaves_its_settings_metrics_curve_and_checkpoint(script, module, run):
    names = set(os.listdir(run))
    assert names >= {"args.json", "metrics.csv", "learning_curve.png", "checkpoint.pt"}
    assert not [name for name in names if name.endswith(".part")]
    saved = module.load_checkpoint(run)
    with open("run/args.json") as file:
        assert module.Args(**json.load(file)) == module.Args(**saved["args"])
    rows = table(run)
    assert list(rows[0])[:3] == ["step", "episode_return", "episode_length"] and len(rows[0]) > 3
    assert int(rows[-1]["step"]) >= 512 and len(rows) == len(saved["history"])
    with open("run/learning_curve.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def logger(module, resume="", total_timesteps=10_000, **settings):
    """A Run with nothing to train."""
    args = module.Args(**dict(env=some_env(module), total_timesteps=total_timesteps) | settings)
    envs = module.VecEnv(args.env, 1, torch.device("cpu"))
    return module.Run(args, envs, resume, agent=torch.nn.Linear(1, 1))


@pytest.mark.plumbing
def test_the_history_of_a_long_run_has_200_rows(script, module):
    run = logger(module, total_timesteps=1003)
    for run.step in range(2, 1005, 2):
        run.log(loss=1.0)
    steps = [row["step"] for row in run.history]
    assert 195 <= len(steps) <= 200 and steps == sorted(set(steps)) and steps[-1] == 1004


@pytest.mark.plumbing
def test_metrics_stand_in_the_columns_of_their_names(script, module):
    run = logger(module, run_dir="run")
    for k, metrics in enumerate([dict(loss=1), dict(now_and_then=2, loss=3), dict(loss=4)]):
        run.step += 100
        run.log(**metrics)
    run.finish()
    run = logger(module, resume="run", run_dir="run")
    run.step += 100
    run.log(added=5, loss=6)
    run.finish()
    rows = table("run")
    assert [row["step"] for row in rows] == ["100", "200", "300", "400"]
    assert [row["loss"] for row in rows] == ["1.0", "3.0", "4.0", "6.0"]
    assert [row["now_and_then"] for row in rows] == ["", "2.0", "", ""]
    assert [row["added"] for row in rows] == ["", "", "", "5.0"]


@pytest.mark.plumbing
def test_tensorboard_keeps_all_rows_where_a_run_is_resumed(script, module):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with module.clean_up():
        run = logger(module, run_dir="run")
        for _ in range(3):
            run.step += 100
            run.log(loss=1)
        run.finish()
        run.step += 100
        run.log(loss=2)  # after the last checkpoint: a resumed run writes this row anew
    with module.clean_up():
        run = logger(module, resume="run", run_dir="run")
        run.step += 100
        run.log(loss=3)
    events = EventAccumulator("run")
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (100, 1), (200, 1), (300, 1), (400, 3)]


@pytest.mark.plumbing
def test_evaluate_scores_the_agent_of_a_run(script, module, run, command):
    before = table(run)
    code, out, err = command("--evaluate", run, "--episodes", 5)
    assert (code, err) == (0, "")
    assert ENDING.search(out)[3] == "5" and len(out.splitlines()) == 1
    assert table(run) == before
    assert f"{module.evaluate(*module.load_agent(run), 5).mean():.1f}" == ENDING.search(out)[1]


@pytest.mark.plumbing
def test_video_films_an_episode(script, module, run, command):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    code, out, _ = command("--evaluate", run, "--episodes", 1, "--video")
    assert code == 0 and ENDING.search(out)
    films = [name for name in os.listdir("run/videos") if name.endswith(".mp4")]
    assert films and os.path.getsize(os.path.join("run/videos", films[0])) > 0


@pytest.mark.plumbing
def test_without_matplotlib_a_run_lacks_only_its_curve(script, module, command, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = command(*run_flags(script, module), "--episodes", 1)
    assert code == 0 and ENDING.search(out)
    assert "matplotlib" in err and err.count("\n") == 1
    assert "learning_curve.png" not in os.listdir("run") and "checkpoint.pt" in os.listdir("run")


@pytest.mark.plumbing
def test_a_copy_alone_in_an_empty_folder_runs_also_on_a_terminal_that_prints_ascii(
        script, module, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    settings = small(script, env=some_env(module))
    alone = functools.partial(processes.be_alone, str(ROOT), str(TESTS))
    words = *flags(settings), "--episodes", 3
    code, out, err = processes.Script(
        tmp_path / f"{script}.py", *words, folder=tmp_path, bomb=alone).end()
    assert (code, err) == (0, "")
    last = out.splitlines()[-1]
    mean, _, episodes = ENDING.search(last).groups()
    assert math.isfinite(float(mean)) and episodes == "3"
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name in last and folder.name.startswith(f"{settings['env']}__{script}__1__")


@pytest.mark.plumbing
def test_a_copy_of_another_name_scores_and_resumes_the_run(script, module, run, tmp_path):
    copy = tmp_path / f"{script}_mine.py"
    shutil.copy(ROOT / f"{script}.py", copy)
    for words in ("--evaluate", run), ("--resume", run, "--total-timesteps", 576):
        code, out, err = processes.Script(copy, *words, "--episodes", 2, folder=tmp_path).end()
        assert (code, err) == (0, "") and ENDING.search(out)


def test_a_file_that_is_pasted_into_a_notebook_works(script, monkeypatch):
    cell = types.ModuleType("cell")  # dataclasses look for it in sys.modules
    monkeypatch.setitem(sys.modules, "cell", cell)
    exec((ROOT / f"{script}.py").read_text(), vars(cell))
    assert not hasattr(cell, "__file__")
    args = cell.Args(**small(script, env=some_env(cell), total_timesteps=64))
    agent, history = cell.train(args)
    assert history and len(cell.evaluate(agent, args, 1)) == 1


@pytest.mark.plumbing
def test_a_reader_that_goes_away_stops_a_run_without_a_traceback(script, module, tmp_path):
    words = flags(small(script, env=some_env(module)))
    code, _, err = start(script, tmp_path, *words, bomb=processes.close_stdout).end()
    assert code and "Traceback" not in err, err


@pytest.mark.exhaustive
def test_so_does_a_reader_at_the_end_of_a_pipe():
    words = [sys.executable, ROOT / "ppo.py", *flags(small("ppo", env="CartPole-v1"))]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    error = done.communicate()[1]
    assert done.returncode and "Traceback" not in error, error


# Errors.


@pytest.mark.plumbing
@pytest.mark.parametrize("words, parts", [
    (["--env", "CartPool-v1"], ["CartPool", "CartPole"]),
    (["--env", "NoSuch-v0"], ["NoSuch"]),
    (["--env", "CartPole-v99"], ["CartPole", "v1"]),
    (["--env", "no_such_module:Env-v0"], ["no_such_module"]),
    (["--env", "probes:NoSuch-v0"], ["NoSuch"]),
    (["--env", "probes:Multi-v0"], ["Multi-v0", "MultiDiscrete", "ppo takes"]),
    (["--env", "probes:Integers-v0"], ["Integers-v0", "int64", "ppo takes"]),
    (["--num-envs", "0"], ["num_envs", "0"]),
    (["--num-envs", "two"], ["num_envs", "two"]),
    (["--gamma", "1.5"], ["gamma", "1.5"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--device", "no_such_device"], ["no_such_device"]),
    (["--device", "meta"], ["meta"]),
    (["--resume", "no_such_folder"], ["no_such_folder"]),
    (["--resume", ""], ["cannot load checkpoint.pt"]),  # as of a shell's variable that is not set
    (["--evaluate", ""], ["cannot load checkpoint.pt"]),
    (["--resume", "one", "--evaluate", "another"], ["--resume", "--evaluate"]),
    (["--resume", "one", "--run-dir", "another"], ["run_dir has no effect"]),
    (["--evaluate", "one", "--learning-rate", "3"], ["learning_rate has no effect"]),
    (["--run-dir", "a" * 300], ["aaa"]),
    (["--env", "probes:Sequence-v0"], ["Sequence-v0"]),
    (["--evaluate", "no_such_folder"], ["no_such_folder"]),
    (["--episodes", "0"], ["episodes"]),
])
def test_a_mistake_gives_one_line_that_names_it(script, module, command, words, parts, tmp_path):
    defaults = run_flags(script, module) if words[0] not in ("--resume", "--evaluate") else []
    assert_one_line(command(*defaults, *words), f"{script}.py: ", *parts)
    assert not os.path.exists("run/checkpoint.pt")


@pytest.mark.plumbing
def test_a_device_that_is_not_there_gives_one_line(script, module, command):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_one_line(command(*run_flags(script, module, device="cuda")), "cuda")


def test_an_action_space_that_it_cannot_take_names_a_script_that_can(script, module, command):
    for kind in {"Discrete", "Box"} - set(module.ACTION_SPACES):
        assert_one_line(command("--env", ENVS[kind]), kind, "ppo")


@pytest.mark.plumbing
def test_a_run_folder_that_cannot_be_written_gives_one_line(script, module, command, tmp_path):
    (tmp_path / "file").touch()
    assert_one_line(command(*run_flags(script, module, run_dir="file/run")), "file/run")


@pytest.mark.plumbing
def test_resuming_into_the_folder_of_another_run_is_refused(script, module, run):
    shutil.copytree(run, "other")
    before = open("other/checkpoint.pt", "rb").read()
    with pytest.raises(module.UserError, match="other holds a run"):
        module.train(more(module, run, run_dir="other"), resume=run)
    assert open("other/checkpoint.pt", "rb").read() == before


@pytest.mark.plumbing
def test_a_run_is_not_written_over(script, module, run, command):
    before = module.load_checkpoint(run)
    assert_one_line(command(*run_flags(script, module, seed=2)), "run", "--resume")
    assert same(module.load_checkpoint(run), before)


@pytest.mark.plumbing
def test_a_damaged_foreign_or_incomplete_checkpoint_gives_one_line(script, module, run, command):
    whole = open("run/checkpoint.pt", "rb").read()
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    for flag in "--resume", "--evaluate":
        for size in (0, 100, len(whole) // 2, len(whole) - 1):
            with open("run/checkpoint.pt", "wb") as file:
                file.write(whole[:size])
            assert_one_line(command(flag, run), "run/checkpoint.pt")
        args = saved["args"] | dict(old_setting=1)
        for wrong in [1, 2], {"weights": torch.zeros(1)}, {}, saved | {"args": args}:
            torch.save(wrong, "run/checkpoint.pt")
            assert_one_line(command(flag, run), "run/checkpoint.pt",
                            *["old_setting"] if wrong and "args" in wrong else [])
        os.remove("run/checkpoint.pt")
        assert_one_line(command(flag, run), "run/checkpoint.pt")


def test_the_checkpoint_of_another_script_gives_one_line(script, module, tmp_path):
    """Its settings, or the names and shapes of its states, cannot fit."""
    args = {field.name: field.default for field in dataclasses.fields(module.Args)}
    torch.save(dict(args=args, step=1, history=[], recent=[], seconds=1), "checkpoint.pt")
    with pytest.raises(module.UserError, match="^cannot load checkpoint.pt: ") as caught:
        module.load_agent(".")
    assert "\n" not in str(caught.value)
    torch.save(dict(args=args | {"of_another": 1}), "checkpoint.pt")
    with pytest.raises(module.UserError, match="cannot load .*no setting of_another"):
        module.load_agent(".")


@pytest.mark.plumbing
def test_settings_that_do_not_fit_the_checkpoint_give_one_line(script, module, run, command):
    assert_one_line(command("--resume", run, "--hidden-size", 7), "run/checkpoint.pt")


@pytest.mark.plumbing
def test_fewer_steps_than_were_taken_are_refused_and_change_nothing(script, module, run, command):
    before = open("run/args.json").read(), open("run/checkpoint.pt", "rb").read()
    step = module.load_checkpoint(run)["step"]
    assert_one_line(command("--resume", run, "--total-timesteps", 100), f"{step:,}", "100")
    assert before == (open("run/args.json").read(), open("run/checkpoint.pt", "rb").read())


@pytest.mark.plumbing
def test_a_checkpoint_of_a_stranger_cannot_run_code(script, module, run, command):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trapped",)

    saved = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save(saved | {"trap": Trap()}, "run/checkpoint.pt")
    assert_one_line(command("--evaluate", run), "run")
    assert not os.path.exists("trapped")


@pytest.mark.plumbing
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, parts", [
    ("NaNReward", ["not finite", "nan"]), ("HugeReward", ["not finite", "inf"]),
    ("NaNObs", ["not finite", "nan"]), ("Misshapen", ["(1,)", "(3,)"]),
    ("TurnedTable", ["(8, 12)", "(12, 8)"]), ("TurnedImage", ["(40, 36, 3)", "(36, 40, 3)"])])
def test_an_environment_that_gives_wrong_numbers_costs_one_line_and_keeps_the_checkpoint(
        script, module, command, name, parts):
    if "Image" in name and script in BLIND:
        pytest.skip("it refuses images")
    words = run_flags(script, module, env=probe(module, name), checkpoint_every=16)
    assert_one_line(command(*words), f"{name}-v0", *parts)
    saved = module.load_checkpoint("run")
    assert 0 < saved["step"] < 512
    assert all(value.isfinite().all() for value in saved["agent"].values())


@pytest.mark.plumbing
def test_an_exception_in_the_environment_shows_its_traceback_under_one_line(
        script, module, command):
    env = probe(module, "Raises")
    code, _, err = command(*run_flags(script, module, env=env, checkpoint_every=16))
    first, *rest = err.splitlines()
    assert code == 2 and first.startswith(f"{script}.py failed on {env}: the probe")
    assert any("probes.py" in line and "in broken" in line for line in rest)
    assert 0 < module.load_checkpoint("run")["step"] < 512


@pytest.mark.plumbing
@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_gives_a_line_that_says_so_and_keeps_the_last_checkpoint(
        script, module, command, monkeypatch, error):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) < 4:
            return save(state, path)
        pathlib.Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    result = command(*run_flags(script, module, checkpoint_every=16))
    words = [str(error)] + ["disk"] * isinstance(error, RuntimeError)
    assert_one_line(result, "run/checkpoint.pt", *words)
    assert 0 < module.load_checkpoint("run")["step"] < 512


def diverge(script, module, command, envs, choices):
    # The environments must not be blamed for what a diverged policy does to them.
    for number, (env, (settings, changes)) in enumerate(itertools.product(envs, choices)):
        folder = f"run{number}"
        changes = dict(env=env, run_dir=folder) | settings | changes
        assert_one_line(command(*run_flags(script, module, **changes)), f"{script}.py: ", code=1)
        saved = module.load_checkpoint(folder)
        assert all(value.isfinite().all() for value in saved["agent"].values())
        rows = table(folder) if os.path.exists(f"{folder}/metrics.csv") else []
        assert all(math.isfinite(float(value)) for row in rows for name, value in row.items()
                   if value and not name.startswith("episode_"))  # no episode may have ended yet


METRICS, WEIGHTS = dict(checkpoint_every=512_000), dict(checkpoint_every=1)  # what is looked at


def test_training_that_diverges_stops_with_code_1_and_keeps_the_last_finite_checkpoint(
        script, module, command):
    diverge(script, module, command, [some_env(module)], zip(DIVERGENT[script], [METRICS, WEIGHTS]))


@pytest.mark.exhaustive
def test_so_it_does_wherever_the_first_number_is_that_is_not_finite(script, module, command):
    envs = [ENVS[kind] for kind in takes(module, "Discrete", "Box")]
    looks = [look | dict(total_timesteps=512_000) for look in (METRICS, WEIGHTS)]
    diverge(script, module, command, envs, itertools.product(DIVERGENT[script], looks))


# Reliability.


def start(script, tmp_path, *words, bomb=None):
    words = *words, *(() if "--episodes" in words else ("--episodes", 1))
    return processes.Script(ROOT / f"{script}.py", *words, folder=tmp_path, bomb=bomb)


def wait_for(condition, process):
    """Until the condition holds or the process ends."""
    while process.is_alive() and not condition():
        time.sleep(0.001)


def more(module, run, **changes):
    """The Args of the run in this folder, for more steps, without a folder of its own."""
    saved = module.load_checkpoint(run)
    return module.Args(**saved["args"] | dict(
        run_dir="", total_timesteps=saved["step"] + 128) | changes)


def test_resuming_twice_from_one_checkpoint_gives_the_same_run_twice(script, module, run):
    saved = module.load_checkpoint(run)
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the state of the process does not matter
        ends.append(module.train(more(module, run), resume=run))
    (a, first), (b, second) = ends
    assert same(timeless(first), timeless(second)) and same(a.state_dict(), b.state_dict())
    assert same(first[:len(saved["history"])], saved["history"]) and first[-1]["step"] > saved["step"]
    assert not same(a.state_dict(), saved["agent"])


def test_a_resumed_run_is_the_run_that_began_new_episodes_there(script, module, monkeypatch):
    """So nothing but the episodes is lost: neither a weight nor a transition nor a statistic."""
    args = module.Args(**small(script, env=some_env(module), run_dir="run"))
    checkpoint, seen = module.Run.checkpoint, []

    def renew(run):
        checkpoint(run)
        if not seen and run.step >= 256:  # do as Run does when it resumes
            seen.append(run.step)
            run.save()
            shutil.copytree("run", "half")
            run.envs.reset(module.seed_everything(args.seed, run.step, 0))

    monkeypatch.setattr(module.Run, "checkpoint", renew)
    agent, history = module.train(args)
    assert seen
    monkeypatch.setattr(module.Run, "checkpoint", checkpoint)
    resumed, rows = module.train(dataclasses.replace(args, run_dir="half"), resume="half")
    assert same(timeless(rows), timeless(history))
    assert same(resumed.state_dict(), agent.state_dict())
    a, b = module.load_checkpoint("run"), module.load_checkpoint("half")
    for name in a.keys() - {"args", "history", "seconds"}:  # the optimizer above all
        assert same(a[name], b[name]), name


@pytest.mark.plumbing
def test_a_finished_run_can_be_resumed_for_more_steps(script, module, run, command):
    code, out, err = command("--resume", run, "--total-timesteps", 1024, "--episodes", 1)
    assert (code, err) == (0, "")
    steps = [int(row["step"]) for row in table(run)]
    assert steps == sorted(set(steps)) and steps[0] < 512 and steps[-1] >= 1024


@pytest.mark.plumbing
def test_a_finished_run_can_be_resumed_and_stays_as_it_was(script, module, run, command):
    before, rows = module.load_checkpoint(run), table(run)
    code, out, err = command("--resume", run, "--episodes", 1)
    assert (code, err) == (0, "") and ENDING.search(out)
    assert same(module.load_checkpoint(run)["agent"], before["agent"]) and table(run) == rows


def test_a_resumed_run_takes_a_new_step_size_and_may_come_from_a_gpu(
        script, module, run, monkeypatch):
    if script == "cem_es":
        pytest.skip("its optimizer is a function")
    saved, used = torch.load("run/checkpoint.pt", weights_only=True), []
    for state in saved.values():
        for group in state.get("param_groups", ()) if isinstance(state, dict) else ():
            group["capturable"] = True
    torch.save(saved, "run/checkpoint.pt")
    for optimizer in (torch.optim.Adam, torch.optim.RMSprop):
        def step(self, step=optimizer.step):
            used.append((float(self.param_groups[0]["lr"]), self.param_groups[0]["capturable"]))
            return step(self)

        monkeypatch.setattr(optimizer, "step", step)
    module.train(more(module, run, learning_rate=1e-9), resume=run)
    assert used and all(rate <= 1.001e-9 and not capturable for rate, capturable in used)


def kill_and_resume(script, module, env, tmp_path, bombs):
    """Kill a run again and again; each time it goes on from its last checkpoint."""
    settings = small(script, env=env, total_timesteps=2048, checkpoint_every=256)
    part, steps = tmp_path / "part", []
    for bomb in bombs:
        exists = (part / "checkpoint.pt").exists()
        words = ["--resume", "part"] if exists else flags(settings | {"run_dir": "part"})
        before = os.stat(part / "checkpoint.pt").st_mtime_ns if exists else 0
        process = start(script, tmp_path, *words, bomb=bomb)
        if bomb is None:  # here the kill comes from outside, at no particular moment
            wait_for(lambda: (part / "checkpoint.pt").exists() and os.stat(
                part / "checkpoint.pt").st_mtime_ns > before, process)
            time.sleep(random.Random(env).uniform(0, 0.05))
            process.kill()
        code, _, err = process.end()
        assert code == -signal.SIGKILL or (bomb is None and code == 0), err
        steps.append(module.load_checkpoint(part)["step"])
    assert steps == sorted(steps) and steps[0] < 2048

    shutil.copytree(part, tmp_path / "twin")
    for folder in ("part", "twin"):
        code, out, err = start(script, tmp_path, "--resume", folder).end()
        assert (code, err) == (0, "") and ENDING.search(out)
    a, b = module.load_checkpoint(part), module.load_checkpoint(tmp_path / "twin")
    assert a["step"] >= 2048 and same(timeless(a["history"]), timeless(b["history"]))
    for name in a.keys() - {"args", "history", "seconds"}:  # the optimizer above all
        assert same(a[name], b[name]), name
    rows = table(part)
    assert rows == table(tmp_path / "twin") and len(rows) == len(a["history"])
    numbers = [row["step"] for row in a["history"]]
    assert numbers == sorted(set(numbers)) and len(numbers) > 10
    _, whole = module.train(module.Args(**settings))  # until the first kill the runs are one
    whole = [row for row in timeless(whole) if row["step"] <= steps[0]]
    assert same(timeless(a["history"])[:len(whole)], whole)


@pytest.mark.plumbing
def test_a_killed_run_goes_on_from_its_last_checkpoint(script, module, tmp_path):
    bombs = [functools.partial(processes.die_in_save, 3),
             functools.partial(processes.die_in_rename, 2)]
    kill_and_resume(script, module, some_env(module), tmp_path, bombs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind, env", [("Discrete", "CartPole-v1"), ("Box", "InvertedPendulum-v5")])
def test_so_does_a_run_that_is_killed_at_any_moment(script, module, kind, env, tmp_path):
    if kind not in module.ACTION_SPACES:
        pytest.skip("the script does not take its actions")
    dice = random.Random(env)
    bombs = [functools.partial(processes.die_in_step, dice.randint(75, 175)),
             functools.partial(processes.die_in_save, 2),
             functools.partial(processes.die_in_rename, dice.randint(2, 9)),
             functools.partial(processes.die_in_step, dice.randint(1, 125)), None, None]
    kill_and_resume(script, module, env, tmp_path, bombs)


def a_signal(script):
    """Ctrl-C for every other script and SIGTERM for the rest, and the exit codes."""
    return [(signal.SIGINT, 130), (signal.SIGTERM, 143)][SCRIPTS.index(script) % 2]


@pytest.mark.plumbing
def test_a_signal_saves_and_stops_and_the_run_can_go_on(script, module, tmp_path):
    number, expected = a_signal(script)
    words = flags(small(script, env=some_env(module), total_timesteps=100_000, run_dir="run"))
    process = start(script, tmp_path, *words)
    wait_for(lambda: (tmp_path / "run/metrics.csv").exists(), process)
    os.kill(process.pid, number)
    code, _, err = process.end()
    assert code == expected, err
    assert err.count("\n") == 1 and "--resume run" in err
    saved = module.load_checkpoint(tmp_path / "run")
    # It stopped between checkpoints, and what it had learnt until then is kept.
    assert saved["history"][-1]["step"] <= saved["step"] < 100_000
    steps = saved["step"] + 1000
    code, _, err = start(script, tmp_path, "--resume", "run", "--total-timesteps", steps).end()
    assert (code, err) == (0, "") and int(table(tmp_path / "run")[-1]["step"]) >= steps


@pytest.mark.plumbing
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


@pytest.mark.plumbing
def test_a_run_that_was_killed_before_it_learnt_anything_can_be_scored_and_resumed(
        script, module, tmp_path, command):
    words = run_flags(script, module)
    bomb = functools.partial(processes.die_in_step, 2)
    assert start(script, tmp_path, *words, bomb=bomb).end()[0] == -signal.SIGKILL
    assert module.load_checkpoint(tmp_path / "run")["step"] == 0
    code, out, err = command("--evaluate", "run", "--episodes", 3)
    assert (code, err) == (0, "") and ENDING.search(out)
    code, out, err = command("--resume", "run", "--episodes", 3)
    assert (code, err) == (0, "") and ENDING.search(out)


# Several processes.


def two_processes(path, tmp_path, *words):
    """Run a file in two processes that work together, in the folders rank0 and rank1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ends = []
    for rank in (0, 1):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        join = functools.partial(processes.join, rank, port)
        ends.append(processes.Script(path, *words, folder=folder, bomb=join))
    return [process.end() for process in ends]


def test_two_processes_train_one_agent_on_different_environments(script, module, tmp_path):
    """Both must end with the same weights to the last bit, and write one run."""
    settings = small(script, env=some_env(module), run_dir=str(tmp_path / "run"))
    (tmp_path / "driver.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import {script} as module

seeds, reset = [], module.VecEnv.reset
module.VecEnv.reset = lambda self, seed: (seeds.append(str(seed)), reset(self, seed))[1]
agent, history = module.train(module.Args(**{settings!r}))
torch.save((agent.state_dict(), seeds, history[-1]["step"]), "end.pt")
torch.distributed.barrier()
sys.stdout.flush(), os._exit(0)
""")
    (code, out, err), (other_code, other_out, other_err) = two_processes(
        tmp_path / "driver.py", tmp_path)
    assert code == other_code == 0, err + other_err
    (a, seeds, steps), (b, other_seeds, other_steps) = (
        torch.load(tmp_path / f"rank{rank}/end.pt", weights_only=True) for rank in (0, 1))
    assert same(a, b) and steps == other_steps >= 512
    assert len(seeds) == len(other_seeds) and not set(seeds) & set(other_seeds) - {"None"}
    assert same(module.load_checkpoint(tmp_path / "run")["agent"], a)
    assert out and not other_out  # only one of them prints


@pytest.mark.plumbing
def test_two_processes_write_one_run_and_print_one_result(script, module, tmp_path):
    words = *run_flags(script, module, run_dir=str(tmp_path / "run")), "--episodes", 3
    ends = two_processes(ROOT / f"{script}.py", tmp_path, *words)
    (code, out, err), (other_code, other_out, other_err) = ends
    assert code == other_code == 0 and err == other_err == other_out == "", err + other_err
    assert len(ENDING.findall(out)) == 1 and ENDING.search(out)[3] == "3"
    assert (tmp_path / "run/learning_curve.png").exists()


@pytest.mark.exhaustive
def test_torchrun_starts_a_script_as_the_readme_says(tmp_path):
    words = flags(small("ppo", env="CartPole-v1", run_dir="run"))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                  ROOT / "ppo.py", *words, "--episodes", 3, cwd=tmp_path,
                  env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(ENDING.findall(done.stdout)) == 1 and ENDING.search(done.stdout)[3] == "3"
    assert (tmp_path / "run/learning_curve.png").exists()


@pytest.mark.plumbing
def test_a_rank_without_other_processes_silences_nothing(script, module, tmp_path):
    words = run_flags(script, module, total_timesteps=64)
    code, out, err = start(script, tmp_path, *words, bomb=processes.have_a_rank).end()
    assert (code, err) == (0, "") and ENDING.search(out)
    assert (tmp_path / "run/checkpoint.pt").exists()

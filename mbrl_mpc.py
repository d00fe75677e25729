# SPDX-License-Identifier: MIT
"""Model-based RL: learn a model of the environment, then plan with it or train a policy in it.

An ensemble of networks learns to predict the next observation, the reward and the end of the
episode. The agent searches for the best plan by the cross-entropy method (CEM), executes its first
action and plans again: model-predictive control (MPC). Or it trains a policy by backpropagation
through the model. Returns are averaged over particles that follow different members of the
ensemble; the members disagree where data are scarce.

(1)  member e predicts delta ~ Normal(mean_e, exp(log_var_e / 2)), where delta is (next_obs - obs,
     rewards), normalized, and P(termination) = sigmoid(logit_e), all functions of (obs, actions)
(2)  model_loss = E[sum(w * ((delta - mean)^2 / exp(log_var) + log_var)) / 2 - log P(terminations)]
     with w = exp(log_var) as a constant and a sum over the dimensions of delta; without w, those
     that are predicted best dominate the gradient (beta-NLL with beta = 1, arXiv:2203.09168)
(3)  next_obs = obs + delta with delta = mean_e + exp(log_var_e / 2) * noise, no longer normalized;
     the reward has no noise. A particle follows a new random member e at every step (ts1) or the
     same one throughout (tsinf)
(4)  returns = sum over t < horizon of gamma^t * alive[t] * rewards[t], plus, with terminal_value,
     gamma^horizon * alive[horizon] * V(obs[horizon]); alive[t+1] = alive[t] * (1 - P(termination))
(5)  cem: plans = mean + std * noise within the bounds, the noise correlated over time; then mean
     and std become those of the elites, the best plans, but std at least a tenth of the first.
     random: the best of independent uniform plans. A Discrete action is the argmax of its part of
     a plan, which has a number for each action
(6)  value_loss = E[(V(obs) - rewards - gamma * (1 - terminations) * target_V(next_obs))^2]; at the
     start of each round target_V is a copy of V, then target_V = target_V + tau * (V - target_V)
(7)  policy: policy_loss = -E[returns of policy(obs)] + ACTOR_PENALTY * E[actor(obs)^2] and
     value_loss = E[(V(obs) - returns)^2], where (4) ends with target_V; all returns and V in (6)
     and (7) are divided by return_unit, the size of a typical return

    repeat
        take num_steps steps of each environment: improve the plans in `rounds` rounds of (5) and
            execute their first actions, or execute policy(obs) + noise
        take num_updates Adam steps on (2); each member draws a new bootstrap of all data
        take num_updates Adam steps on (7) with a policy, or on (6) with terminal_value

Levine's CS 285 numbers the versions of model-based RL: 0.5 plans with a model of random data only
(--learning-starts and --total-timesteps equal); 1.0 also learns from the data that its plans
collect, but follows each plan for many steps (--replan-every 10); 1.5 plans again at every step
(with an ensemble: PETS, Chua et al. 2018, arXiv:1805.12114, which is given the rewards); 2.0 is
--planner policy (SVG, Heess et al. 2015, arXiv:1510.09142, with a V at the horizon as in Dreamer,
arXiv:1912.01603). A time limit (truncation) bootstraps from V(next_obs); only a termination does
not.

    python mbrl_mpc.py --env Pendulum-v1 --planner policy
"""
import argparse, collections, contextlib, csv, fnmatch, functools, io, json, math, os, pathlib
import random, re, signal, sys, time, traceback, typing
from dataclasses import dataclass, field, fields

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ============================================================================== Hyperparameters
def arg(default, help, low=-3e38, high=3e38):
    return field(default=default, metadata=dict(help=help, limits=[low, high]))


@dataclass(init=False)
class Args:
    # The run: the same in every script.
    env: str = arg("CartPole-v1", "environment id; module:Id imports the module first")
    total_timesteps: int = arg(20_000, "steps over all environments and processes", 1)
    num_envs: int = arg(1, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of networks, environments and sampling", 0, 2**53)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda if there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder of the run; empty: a new one in runs/, from Python none")
    checkpoint_every: int = arg(0, "steps between checkpoints; 0: one a minute", 0)
    # The algorithm.
    planner: typing.Literal["cem", "random", "policy"] = arg("cem", "cem, random (5) or policy (7)")
    learning_starts: int = arg(1000, "steps of random actions before learning", 0)
    num_steps: int = arg(200, "steps of each environment between rounds of updates", 1)
    num_updates: int = arg(500, "updates of each network in a round", 1)
    batch_size: int = arg(256, "transitions in an update, for each member", 1)
    learning_rate: float = arg(1e-3, "step size of Adam, lowered linearly to 0 in each round", 0)
    hidden_size: int = arg(200, "units in each of the two hidden layers", 1)
    ensemble_size: int = arg(5, "members of the ensemble", 1)
    propagation: typing.Literal["ts1", "tsinf"] = arg("ts1", "ts1 or tsinf (3)")
    horizon: int = arg(25, "steps that the model looks ahead", 1)
    gamma: float = arg(0.99, "discount factor", 0, 1)
    terminal_value: bool = arg(False, "add the value of the last imagined state (4)")
    tau: float = arg(0.1, "step of target_V towards V after each update", 0, 1)
    sigma: float = arg(0.5, "std of cem's first plans and of policy noise; 1: half the range", 0)
    replan_every: int = arg(1, "steps that a plan is followed", 1)
    population: int = arg(200, "plans in a round of cem, or random plans", 2)
    elites: int = arg(20, "best plans of a round of cem", 1)
    rounds: int = arg(3, "rounds of cem", 1)
    correlation: float = arg(0.7, "correlation of the noise of successive actions (5)", 0, 0.99)

    def __init__(self, **given):
        if given.get("planner") == "policy":
            given = POLICY_PRESETS.get(str(given.get("env")), POLICY) | given
        apply_settings(self, given)


SMALL = dict(num_steps=50, num_updates=200, learning_rate=5e-3, ensemble_size=3, hidden_size=64,
             rounds=2)
PRESETS = {  # settings that are known to work; keys may be patterns
    "CartPole-v1": SMALL | dict(total_timesteps=5000, num_envs=5, learning_starts=500, horizon=15,
                                population=40, elites=5, correlation=0.0, terminal_value=True),
    "Pendulum-v1": SMALL | dict(total_timesteps=4000, num_envs=4, learning_starts=400, horizon=20,
                                population=75, elites=7, sigma=1.0)}
POLICY = SMALL | dict(num_envs=4, learning_starts=400, batch_size=128, learning_rate=3e-3,
                      horizon=10, terminal_value=True)
POLICY_PRESETS = {  # of --planner policy; they beat PRESETS, and POLICY holds everywhere else
    "Pendulum-v1": POLICY | dict(horizon=8, gamma=0.95, sigma=0.5),
    "InvertedPendulum-v5": POLICY | dict(total_timesteps=5000, sigma=0.1)}
ACTION_SPACES = "Discrete", "Box"
LOG_VAR_RANGE = -10, 2  # of normalized deltas, whose variance is 1
MIN_STD_FRACTION = 0.1  # cem's std stays above this fraction of its first std
ACTOR_PENALTY = 0.01  # keeps the actor's outputs small: a saturated tanh leaves no gradient
MAX_GRAD_NORM = 0.5  # of V and the policy: gradients through imagined terminations can be huge


# ===================================================================================== Networks
class Normalizer(nn.Module):
    """Normalizes (..., size) by the mean and standard deviation of the data it was fitted to."""

    def __init__(self, size):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(size)), nn.Buffer(torch.ones(size))

    def fit(self, x):
        all_reduce_mean(mean := x.mean(0))
        all_reduce_mean(variance := (x - mean).square().mean(0))
        self.mean.copy_(mean)
        std = variance.sqrt()
        self.std.copy_(std * (std > 1e-6 * mean.abs()))  # less is rounding error

    def forward(self, x):
        return (x - self.mean) / torch.where(self.std > 0, self.std, 1.0)


def mlp(*sizes):
    layers = [layer for n, m in zip(sizes, sizes[1:]) for layer in (nn.Linear(n, m), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class Model(nn.Module):
    """The ensemble of E networks. Batches are (E, B, ...), a row of B for each member."""

    def __init__(self, obs_size, action_size, args):
        super().__init__()
        self.input_norm, self.delta_norm = (
            Normalizer(size) for size in (obs_size + action_size, obs_size + 1))
        sizes = [obs_size + action_size, args.hidden_size, args.hidden_size, 2 * obs_size + 3]
        self.weights = nn.ParameterList(
            torch.randn(args.ensemble_size, n, m) / math.sqrt(n) for n, m in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(args.ensemble_size, 1, m) for m in sizes[1:])

    def forward(self, obs, actions):
        """The normalized mean and log_var (E, B, obs_size + 1) and the logit (E, B) of (1)."""
        x = self.input_norm(torch.cat([obs, actions], -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.silu(x, inplace=not x.requires_grad) if i else x, weight)
        size, (low, high) = len(self.delta_norm.mean), LOG_VAR_RANGE
        mean, log_var, logit = x.split([size, size, 1], -1)                                 # (1)
        return mean, low + (high - low) * log_var.sigmoid(), logit.squeeze(-1)

    def loss(self, obs, actions, next_obs, rewards, terminations):
        """The loss (2) of each transition (E, B)."""
        mean, log_var, logit = self(obs, actions)
        delta = self.delta_norm(torch.cat([next_obs - obs, rewards.unsqueeze(-1)], -1))
        w = log_var.exp().detach()
        losses = (w * ((delta - mean).square() / log_var.exp() + log_var) / 2).sum(-1)
        return losses + F.binary_cross_entropy_with_logits(logit, terminations, reduction="none")

    def predict(self, obs, actions, noise):
        """next_obs (3), rewards and P(termination) of particles (E, B, ...), one per member."""
        mean, log_var, logit = self(obs, actions)
        delta = mean + (log_var / 2).exp() * noise
        delta = self.delta_norm.mean + self.delta_norm.std * delta                          # (3)
        return obs + delta[..., :-1], delta[..., -1], logit.sigmoid()


class Agent(nn.Module):
    """The model, V (critic) and policy (actor), and the planner, which plans with the model."""

    plans = None  # the current plans (N, H, A), which are no part of the state_dict

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.discrete = args, isinstance(action_space, gym.spaces.Discrete)
        if len(obs_space.shape) == 3:
            raise UserError(f"{NAME} predicts vectors, not images; ppo takes images")
        if self.discrete and args.planner == "policy":
            raise UserError(f"policy needs Box actions, {args.env} has Discrete; use --planner cem")
        if args.elites >= args.population and args.planner == "cem":
            raise UserError(f"elites is {args.elites}, not less than population {args.population}")
        if args.replan_every > args.horizon:
            raise UserError(f"replan_every is {args.replan_every}, but horizon only {args.horizon}")
        obs_size, action_size = obs_space.shape[0], gym.spaces.flatdim(action_space)
        space = gym.spaces.Box(-1, 1, (action_size,)) if self.discrete else action_space
        buffer = functools.partial(nn.Buffer, persistent=False)
        self.low, self.high, self.center, self.scale = map(buffer, box_bounds(space))
        t = torch.arange(args.horizon)  # noise[t] and noise[u] correlate by correlation^|t - u|
        self.noise_cholesky = buffer(
            torch.linalg.cholesky(args.correlation ** (t - t.unsqueeze(1)).abs()))
        self.model, self.obs_norm = Model(obs_size, action_size, args), Normalizer(obs_size)
        self.critic = mlp(obs_size, args.hidden_size, args.hidden_size, 1)
        self.actor = mlp(obs_size, args.hidden_size, args.hidden_size, action_size)

    def fit_normalizers(self, obs, actions, next_obs, rewards):
        self.obs_norm.fit(obs)
        self.model.input_norm.fit(torch.cat([obs, actions], -1))
        self.model.delta_norm.fit(torch.cat([next_obs - obs, rewards.unsqueeze(-1)], -1))

    def return_unit(self):
        """The size of a typical return; losses (6) and (7) are measured in this unit."""
        norm = self.model.delta_norm  # whose last dimension is the reward
        return norm.mean[-1].hypot(norm.std[-1]).clamp(min=1e-6) / (1.01 - self.args.gamma)

    def value(self, obs):
        return self.return_unit() * self.critic(self.obs_norm(obs)).squeeze(-1)

    def policy(self, obs):
        return self.center + self.scale * self.actor(self.obs_norm(obs)).tanh()

    def project(self, actions):
        """The nearest actions (..., A) that can be executed: within the bounds, or one-hot."""
        if self.discrete:
            return torch.eye(len(self.center), device=actions.device)[actions.argmax(-1)]
        return actions.clamp(self.low, self.high)

    def sample_noise(self, batch_size=1, fixed=False):
        """The noise of plans (R, K, H, A) and of states (H, E, batch_size, obs_size + 1),
        and random orders of particles (H, E)."""
        args, device = self.args, self.center.device
        generator = torch.Generator(device).manual_seed(0) if fixed else None
        options = dict(device=device, generator=generator)
        rounds = dict(cem=args.rounds, random=1, policy=0)[args.planner]
        # Correlated in time, as in iCEM (arXiv:2008.06389): independent actions cancel out.
        plan_noise = self.noise_cholesky @ torch.randn(
            rounds, args.population, args.horizon, len(self.center), **options)
        plan_noise[:, 0] = 0  # the mean itself is one of the plans
        if args.planner == "random":
            plan_noise = 2 * torch.rand(plan_noise.shape, **options) - 1  # independent, uniform
        H, E = args.horizon, args.ensemble_size
        noise = torch.randn(H, E, batch_size, len(self.model.delta_norm.mean), **options)
        noise[..., -1] = 0  # rewards are not sampled, as only their mean counts in (4)
        return plan_noise, noise, torch.rand(H, E, **options).argsort(-1)

    def rollout_model(self, obs, act, noise, orders):
        """The returns (4) (B,) from obs (B, obs_size) with the actions act(t, obs)."""
        E, gamma, returns = self.args.ensemble_size, self.args.gamma, 0
        obs = obs.expand(E, *obs.shape)
        alive = torch.ones_like(obs[..., 0])  # (E, B)
        for t in range(self.args.horizon):
            if self.args.propagation == "ts1":  # a particle's position is its member
                obs, alive = obs[orders[t]], alive[orders[t]]
            actions = act(t, obs).expand(E, -1, -1)
            next_obs, rewards, p_termination = self.model.predict(obs, actions, noise[t])
            returns = returns + gamma ** t * (alive * rewards).mean(0)                      # (4)
            alive = alive * (1 - p_termination)
            obs = torch.where(alive.unsqueeze(-1) > 0, next_obs, obs)  # the dead stay finite
        if self.args.terminal_value:
            returns = returns + gamma ** self.args.horizon * (alive * self.value(obs)).mean(0)
        return returns

    def plan(self, obs, mean, plan_noise, noise, orders):
        """Search for the best plans for obs (N, obs_size), from the means (N, H, A)."""
        args, obs = self.args, obs.repeat_interleave(self.args.population, 0)

        def score(plans):  # (N, K, H, A), returns (N, K)
            actions = plans.flatten(0, 1).transpose(0, 1)  # (H, N * K, A)
            returns = self.rollout_model(obs, lambda t, obs: actions[t], noise, orders)
            return returns.view(plans.shape[:2])

        sigma, elites = args.sigma, args.elites
        if args.planner == "random":  # one round of uniform plans, of which the best is taken
            mean, sigma, elites = self.center.expand_as(mean), 1, 1
        std = sigma * self.scale.expand_as(mean)
        return cem(score, self.project, mean, std, plan_noise, elites)

    @torch.inference_mode()
    def reset(self, episode_starts):
        """Forget the plans where an episode starts (N,)."""
        if self.plans is None or len(self.plans) != len(episode_starts):
            self.plans = self.center.expand(len(episode_starts), self.args.horizon, -1)
            self.steps = torch.zeros_like(episode_starts)
        self.plans = torch.where(episode_starts.view(-1, 1, 1) > 0, self.center, self.plans)
        self.steps = torch.where(episode_starts > 0, 0, self.steps)  # since the episode started

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """Actions (N,) or (N, A) for obs (N, obs_size); call reset where an episode starts."""
        if self.args.planner == "policy":
            actions = self.policy(obs)
            if not deterministic:
                actions = actions + self.args.sigma * self.scale * torch.randn_like(actions)
            return self.project(actions)
        if self.plans is None or len(self.plans) != len(obs):
            self.reset(obs.new_zeros(len(obs)))
        self.plans = torch.cat([self.plans[:, 1:], self.center.expand_as(self.plans[:, :1])], 1)
        if (due := self.steps % self.args.replan_every == 0).any():
            plans = self.plan(obs, self.plans, *self.sample_noise(fixed=deterministic))
            self.plans = torch.where(due.view(-1, 1, 1), plans, self.plans)
        self.steps = self.steps + 1
        return self.plans[:, 0].argmax(-1) if self.discrete else self.plans[:, 0]

    def random_actions(self, obs):
        """Uniform actions (N,) or (N, A)."""
        noise = 2 * torch.rand(len(obs), len(self.center), device=obs.device) - 1
        actions = self.project(self.center + self.scale * noise)
        return actions.argmax(-1) if self.discrete else actions


class Dataset:
    """All transitions so far."""

    tensors = []  # obs, actions, next_obs, rewards and terminations (B, ...)

    def add(self, *transitions):
        self.tensors = [torch.cat(x) for x in zip(self.tensors, transitions)] or list(transitions)

    def state_dict(self):
        return dict(tensors=self.tensors)

    def load_state_dict(self, state):
        self.tensors = state["tensors"]


# ==================================================================================== Algorithm
def cem(score, project, mean, std, noise, elites):
    """The mean (N, H, A) of the elites after a round (5) for each row of noise (R, K, H, A)."""
    min_std = MIN_STD_FRACTION * std
    for row in noise:
        plans = project(mean.unsqueeze(1) + std.unsqueeze(1) * row)  # (N, K, H, A)
        scores = score(plans)  # (N, K)
        best = torch.where(scores.isfinite(), scores, -math.inf).topk(elites)               # (5)
        # If fewer scores than elites are finite, the best plan fills the other places.
        indices = torch.where(best.values > -math.inf, best.indices, best.indices[:, :1])
        elite_plans = plans.take_along_dim(indices[..., None, None], 1)
        mean = elite_plans.mean(1)                                                          # (5)
        std = elite_plans.std(1, correction=0).clamp(min=min_std)
    return mean


def train(args, resume=""):
    """Train a new agent, or resume the run in the folder `resume`; return (agent, history)."""
    if args.learning_starts > args.total_timesteps:
        raise UserError(
            f"learning_starts is {args.learning_starts:,}, but total_timesteps is "
            f"{args.total_timesteps:,}: pass --learning-starts {args.total_timesteps // 10}")
    device = setup(args)
    envs = VecEnv(args.env, args.num_envs, device)
    agent, target = (Agent(envs.obs_space, envs.action_space, args).to(device) for _ in range(2))
    target.requires_grad_(False)  # a copy of the model, which is frozen, and target_V
    model_weights = flatten_parameters(agent.model)
    weights, target_weights = (
        flatten_parameters(nn.ModuleList([x.critic, x.actor])) for x in (agent, target))
    model_optimizer, optimizer = (  # on a GPU, graphs read the learning rate from a tensor
        torch.optim.Adam([x], torch.tensor(args.learning_rate, device=device), fused=True,
                         capturable=device.type == "cuda") for x in (model_weights, weights))
    dataset = Dataset()  # each process has its own; a checkpoint holds the first one's
    run = Run(args, envs, resume, agent=agent, model_optimizer=model_optimizer,
              optimizer=optimizer, dataset=dataset)

    def update_model(*batch):
        """One Adam step on a batch (E, B, ...); return the loss."""
        loss = agent.model.loss(*batch).mean(1).sum()                                       # (2)
        model_weights.grad.zero_()
        loss.backward()
        all_reduce_mean(model_weights.grad)
        model_optimizer.step()
        return loss.detach()

    def update_actor_critic(obs, actions, next_obs, rewards, terminations, *noise):
        """One Adam step of V and the policy on a batch (B, ...); return value_loss, policy_loss."""
        if args.planner == "policy":
            returns = target.rollout_model(obs, lambda t, obs: agent.policy(obs), *noise)
        else:
            next_values = torch.where(terminations > 0, 0.0, target.value(next_obs))
            returns = rewards + args.gamma * next_values
        unit = agent.return_unit()
        losses = [((agent.value(obs) - returns.detach()) / unit).square().mean()]      # (6), (7)
        if args.planner == "policy":
            penalty = agent.actor(agent.obs_norm(obs)).square().mean()
            losses.append(-(returns / unit).mean() + ACTOR_PENALTY * penalty)               # (7)
        weights.grad.zero_()
        sum(losses).backward()
        all_reduce_mean(weights.grad)
        weights.grad.mul_((MAX_GRAD_NORM / weights.grad.norm()).clamp(max=1))
        optimizer.step()
        target_weights.lerp_(weights, args.tau)                                             # (6)
        return torch.stack(losses).detach()

    agent.plan, update_model, update_actor_critic = (
        cuda_graph(f, device) for f in (agent.plan, update_model, update_actor_critic))
    while run.step < args.total_timesteps:
        run.checkpoint()
        act = agent.act if run.step >= args.learning_starts else agent.random_actions
        rollout = []
        for _ in range(args.num_steps):
            agent.reset(envs.episode_starts)
            obs, actions = envs.obs, act(envs.obs)
            rollout.append((obs, actions, *envs.step(actions)[:3]))
        obs, actions, next_obs, rewards, terminations = (
            torch.stack(x).flatten(0, 1) for x in zip(*rollout))  # each (T * N, ...)
        # After a termination next_obs may be NaN; the model then learns that nothing changes.
        next_obs = torch.where(next_obs.isfinite(), next_obs, obs)
        if agent.discrete:
            actions = F.one_hot(actions, len(agent.center)).float()
        dataset.add(obs, actions, next_obs, rewards, terminations)
        run.step += args.num_steps * args.num_envs * WORLD_SIZE
        if run.step < args.learning_starts:
            run.log()
            continue

        agent.fit_normalizers(*dataset.tensors[:4])
        size, batch_size = len(dataset.tensors[0]), args.batch_size
        bootstraps = torch.randint(size, (args.ensemble_size, size), device=device)
        rates = [args.learning_rate * (1 - i / args.num_updates) for i in range(args.num_updates)]
        for rate in rates:
            model_optimizer.param_groups[0]["lr"].fill_(rate)
            draws = torch.randint(size, (args.ensemble_size, batch_size), device=device)
            indices = bootstraps.gather(1, draws)
            metrics = dict(model_loss=update_model(*(x[indices] for x in dataset.tensors)))
        target.load_state_dict(agent.state_dict())
        for rate in rates if args.terminal_value or args.planner == "policy" else ():
            optimizer.param_groups[0]["lr"].fill_(rate)
            indices = torch.randint(size, (batch_size,), device=device)
            noise = agent.sample_noise(batch_size)[1:] if args.planner == "policy" else ()
            losses = update_actor_critic(*(x[indices] for x in dataset.tensors), *noise)
            metrics |= zip(["value_loss", "policy_loss"], losses)
        run.log(**metrics)
    run.finish()
    return agent, run.history


# ===================================================================================== Plumbing
# The same text in all nine scripts: processes, environments, run folder and command line.

NAME = pathlib.Path(globals().get("__file__", "notebook.py")).stem
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes that torchrun started
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
OPENED = []  # environments and writers, for clean_up to close
CLEAR = "\033[K" * sys.stderr.isatty()  # erases the progress line, which the cursor is on


class UserError(ValueError):
    """A mistake that the user can correct: one line on the command line, exit code 2."""


def apply_settings(args, given):
    """Given settings beat the preset of the environment, which beats the defaults."""
    env = str(given.get("env", args.env))
    preset = next((PRESETS[key] for key in PRESETS if fnmatch.fnmatchcase(env, key)), {})
    if unknown := given.keys() - {f.name for f in fields(args)}:
        raise UserError(f"{NAME} has no setting {', '.join(unknown)}")
    for f in fields(args):
        value, kind = given.get(f.name, preset.get(f.name, f.default)), type(f.default)
        (low, high), choices = f.metadata["limits"], typing.get_args(f.type)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            new = os.fspath(value) if kind is str else kind(float(value))  # 1e5 is an int, too
            valid = new in choices if choices else kind is str or low <= new == float(value) <= high
            if valid:
                setattr(args, f.name, new)
                continue
        limits = f" >= {low:g}" * (low > -3e38) + f" and <= {high:g}" * (high < 3e38)
        wanted = " or ".join(choices) or kind.__name__ + limits
        raise UserError(f"{f.name} is {value}, but must be {wanted}")


def seed_everything(*key):
    """Seed all generators with a number made from the key; return it for the environments."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return seed


@contextlib.contextmanager
def clean_up():
    """On exit, close what was opened, and restore torch's threads and all random states."""
    opened, threads = len(OPENED), torch.get_num_threads()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
        torch.set_num_threads(threads)
        while len(OPENED) > opened:
            with contextlib.suppress(Exception):  # it must not cost the result
                OPENED.pop().close()


def setup(args):
    """Choose the device, join the other processes, and seed the networks alike in all of them."""
    gpus = torch.cuda.device_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # per process
    name = args.device.replace("auto", "cuda" if gpus else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, dtype=torch.double, device=device).item()  # mps has no double
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {name} cannot be used: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # graphs refuse the default stream
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    return device


def all_reduce_mean(tensor):
    """Average a tensor over the processes, in place."""
    if WORLD_SIZE > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= WORLD_SIZE


def flatten_parameters(module):
    """Make the parameters views of one vector: this saves a fifth of an update on the CPU."""
    parameters = list(module.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    vector.grad = torch.zeros_like(vector)
    nn.utils.vector_to_parameters(vector, parameters)
    for p, grad in zip(parameters, vector.grad.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return vector


def cuda_graph(function, device):
    """On one GPU, replay `function` (tensors to a tensor) as a CUDA graph per set of shapes."""
    if device.type != "cuda" or WORLD_SIZE > 1:
        return function
    calls, graphs = collections.Counter(), {}

    def replay(*inputs):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] += 1
        if calls[shapes] <= 3:  # warm-up; they are real calls, too
            return function(*inputs)
        if shapes not in graphs:
            graph, static_inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
                graphs[shapes] = graph, static_inputs, function(*static_inputs)
        graph, static_inputs, output = graphs[shapes]
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        graph.replay()
        return output.clone()

    return replay


def box_bounds(space):
    """Low, high, center and half-width of a flattened Box (size,).

    Where a bound is missing, the center is the allowed number nearest to 0, the half-width 1."""
    low, high = (torch.tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
    bounded = (high - low).isfinite() & (high > low)
    center = torch.where(bounded, (low + high) / 2, 0.0).clamp(low, high)
    return low, high, center, torch.where(bounded, (high - low) / 2, 1.0)


def make_env(env_id, wrappers=(), **kwargs):
    """One environment: Atari frames are preprocessed, observations that are no Box flattened."""
    env = gym.make(env_id, **kwargs, **dict(frameskip=1) if "ALE/" in env_id else {})
    OPENED.append(env)
    if "ALE/" in env_id:
        env = gym.wrappers.AtariPreprocessing(env)
        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
    for wrapper in wrappers:
        env = wrapper(env)
    if not isinstance(env.observation_space, gym.spaces.Box):
        env = gym.wrappers.FlattenObservation(env)
    return env


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    """gymnasium's in SAME_STEP mode, a quarter faster: it keeps no infos but `final_obs`."""

    def step(self, actions):
        results, final_obs = [], {}
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            obs, reward, termination, truncation, _ = env.step(action)
            if termination or truncation:
                final_obs[i] = np.array(obs)
                obs, _ = env.reset()
            results.append((obs, float(reward), bool(termination), bool(truncation)))
        obs, *columns = zip(*results)
        return obs, *map(np.array, columns), dict(final_obs=final_obs)


class VecEnv:
    """Parallel copies of an environment, as tensors (num_envs, ...) on `device`.

    Observations are vectors, or images of bytes (C, H, W). `obs` is the one to act on,
    `episode_starts` is 1 where it is the first of an episode, and `episodes` collects
    (environment, return, length) of the episodes that end."""

    def __init__(self, env_id, num_envs, device, wrappers=(), **kwargs):
        if atari := "ALE/" in env_id:
            import ale_py  # registers them
        if atari and not kwargs and not wrappers:  # in C++ threads
            self.envs = gym.make_vec(env_id, num_envs, "vector_entry_point", use_fire_reset=False,
                                     reward_clipping=False, autoreset_mode="SameStep")
        else:
            self.envs = SyncVectorEnv([lambda: make_env(env_id, wrappers, **kwargs)] * num_envs,
                                      autoreset_mode="SameStep")
        OPENED.append(self.envs)
        space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        self.id, self.device, self.shape, self.episodes = env_id, device, space.shape, []
        kind = type(self.action_space).__name__
        if not isinstance(space, gym.spaces.Box):
            raise UserError(f"{env_id} observes {space}, which has no fixed size")
        if kind not in ACTION_SPACES or kind == "Box" and self.action_space.dtype.kind != "f":
            raise UserError(f"{NAME} takes {' and '.join(ACTION_SPACES)} actions, {env_id} has "
                            f"{self.action_space}; ppo takes Discrete and float Box actions")
        # NatureCNN needs images of 36 x 36 or more; smaller ones become vectors.
        self.image = space.dtype == np.uint8 and len(self.shape) == 3 and sorted(self.shape)[1] > 35
        low, high = (self.to_array(x[None])[0] for x in (space.low, space.high))
        self.obs_space = gym.spaces.Box(low, high, dtype=low.dtype)

    def to_array(self, obs):
        """Check the shape of observations; return vectors (N, size) or images (N, C, H, W)."""
        if wrong := {np.shape(x) for x in obs} - {self.shape}:
            raise UserError(f"{self.id} observes shape {self.shape}, but gave {wrong}")
        if not self.image:
            return np.array(obs, np.float32).reshape(len(obs), -1)
        array = np.array(obs, np.uint8)
        return array if self.shape[0] < self.shape[2] else np.moveaxis(array, 3, 1).copy()

    def to_tensor(self, array, checked=slice(None)):
        if not np.isfinite(array[checked]).all():
            wrong = array[~np.isfinite(array)]
            raise UserError(f"{self.id} gave observations or rewards that are not finite: {wrong}")
        return torch.from_numpy(array).to(self.device)

    def reset(self, seed):
        """Begin an episode everywhere; environment i gets seed + i, or seed[i] of a list."""
        self.obs = self.to_tensor(self.to_array(self.envs.reset(seed=seed)[0]))
        self.episode_starts = torch.ones(len(self.obs), device=self.device)
        self.returns, self.lengths = np.zeros((2, len(self.obs)))  # of the episodes so far

    def step(self, actions):
        """Act in all environments; return next_obs, rewards, terminations and dones.

        next_obs is the true successor, also where an episode ends and `obs` is of the next one."""
        actions, space = actions.cpu().numpy(), self.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = actions + space.start
        elif not np.isfinite(actions).all():
            raise FloatingPointError("the agent's actions are not finite")
        else:
            actions = actions.reshape(-1, *space.shape).clip(space.low, space.high)
        obs, rewards, terminations, truncations, infos = self.envs.step(
            actions.astype(space.dtype, copy=False))
        array, dones = self.to_array(obs), terminations | truncations
        self.obs = next_obs = self.to_tensor(array)
        self.returns += rewards
        self.lengths += 1
        if ended := dones.nonzero()[0].tolist():
            array = array.copy()
            for i in ended:
                array[i] = self.to_array([infos["final_obs"][i]])
                self.episodes.append((i, float(self.returns[i]), float(self.lengths[i])))
                self.returns[i] = self.lengths[i] = 0
            next_obs = self.to_tensor(array, ~terminations)  # what follows those does not count
        rewards, terminations, self.episode_starts = self.to_tensor(
            np.array([rewards, terminations, dones], np.float32)).unbind()
        return next_obs, rewards, terminations, self.episode_starts


def load_checkpoint(folder, device="cpu", **modules):
    """Read a run's checkpoint, which can hold no code, and load the states of these modules."""
    path = pathlib.Path(folder, "checkpoint.pt")
    try:
        saved = torch.load(path, device, weights_only=True)
        Args(**saved["args"])  # refuses those of another script
        for name, module in modules.items():
            if isinstance(module, torch.optim.Optimizer):  # its settings are those of args
                saved[name]["param_groups"] = module.state_dict()["param_groups"]
            module.load_state_dict(saved[name])
    except Exception as error:
        raise UserError(f"cannot load {path}: {type(error).__name__}: {error}") from error
    return saved


class Run:
    """A training run: its step, metrics and folder, and checkpoints of the modules' states."""

    stop_signal = 0  # the last signal that asked to stop

    def __init__(self, args, envs, resume, **modules):
        self.args, self.envs, self.modules, self.writer = args, envs, modules, None
        saved = load_checkpoint(resume, envs.device, **modules) if resume else dict(
            args=vars(args), step=0, history=[], recent=[], seconds=0)
        self.step, self.history, self.recent = saved["step"], saved["history"], saved["recent"]
        self.start_time, self.next_save = time.time() - saved["seconds"], 0
        # The last batch may end beyond total_timesteps; such a run can still be resumed.
        if args.total_timesteps < min(self.step, saved["args"]["total_timesteps"]):
            raise UserError(f"{resume} is at step {self.step:,}, beyond {args.total_timesteps:,}")
        self.folder = pathlib.Path(args.run_dir) if args.run_dir and RANK == 0 else None
        if self.folder:
            exists = os.path.exists(self.folder / "checkpoint.pt")
            if exists and not (resume and self.folder.samefile(resume)):
                raise UserError(f"{self.folder} holds a run; --resume {self.folder} continues it")
            self.write("args.json", lambda path: path.write_text(json.dumps(vars(args), indent=2)))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
                OPENED.append(self.writer)
        if RANK == 0:
            print(f"{NAME} on {envs.device}:", {name: value for name, value in vars(args).items()
                                                if value != getattr(Args, name)}, flush=True)
        # A resumed run starts new episodes; its random numbers depend only on seed, step and rank.
        envs.reset(seed_everything(args.seed, self.step, RANK))

    def write(self, name, save):
        """Call save(path) for a temporary file, then rename it: a kill cannot leave half of it."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # a RuntimeError of torch.save hides the cause
            hint = "; is the disk full?" * isinstance(error, RuntimeError)
            raise UserError(f"cannot write {path}: {error}{hint}") from error

    def checkpoint(self):
        """Call once per iteration: save if a checkpoint is due, stop if a signal asked for it."""
        stop = torch.tensor(float(Run.stop_signal), device=self.envs.device)
        all_reduce_mean(stop)  # all processes stop as soon as one is asked to
        if stop:
            self.finish()
            if self.folder:
                print(f"{CLEAR}stopped; --resume {self.folder} continues", file=sys.stderr)
            raise SystemExit(128 + (Run.stop_signal or signal.SIGTERM))
        if (self.step if self.args.checkpoint_every else time.time()) >= self.next_save:
            self.save()

    def save(self):
        every = self.args.checkpoint_every
        self.next_save = self.step + every if every else time.time() + 60
        state = {name: module.state_dict() for name, module in self.modules.items()}
        if not all(value.isfinite().all() for value in state["agent"].values()):
            raise FloatingPointError(f"the agent's weights are not finite at step {self.step:,}")
        if self.folder:
            state |= dict(args=vars(self.args), step=self.step, history=self.history,
                          recent=self.recent, seconds=time.time() - self.start_time)
            self.write("checkpoint.pt", lambda path: torch.save(state, path))

    def log(self, **metrics):
        """At most 200 times a run, add a row of metrics to the history and print the progress."""
        self.recent = (self.recent + self.envs.episodes)[-20:]
        self.envs.episodes.clear()
        last, total = self.history[-1]["step"] if self.history else 0, self.args.total_timesteps
        if self.step * 200 // total == last * 200 // total:
            return
        _, score, length = np.mean(self.recent or [[math.nan] * 3], 0).tolist()
        metrics = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"not finite at step {self.step:,}: {metrics}")
        self.history.append(row := dict(step=self.step, seconds=time.time() - self.start_time,
                                        episode_return=score, episode_length=length) | metrics)
        if self.folder:
            columns = dict.fromkeys(name for row in self.history for name in row)
            table = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
            table.writeheader(), table.writerows(self.history)
            self.write("metrics.csv", lambda path: path.write_text(text.getvalue()))
        for name, value in row.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)
        if RANK == 0:
            speed = self.step / row["seconds"]
            score = f"return {score:.1f}" if self.recent else "no episode has ended yet"
            line = (f"step {self.step:,} of {total:,} ({self.step / total:.0%}): {score}, "
                    f"{speed:,.0f} steps/s, {max(0, total - self.step) / speed:.0f} s left")
            in_place = sys.stdout.isatty() and self.step < total  # the last line stays
            print(line, end="\033[K\r" if in_place else "\n", flush=True)

    def finish(self):
        """Save, and draw the learning curve."""
        self.save()
        if not self.folder:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return print("learning_curve.png needs matplotlib", file=sys.stderr)
        axes = Figure((7, 4), dpi=150, layout="constrained").subplots()
        axes.plot(*zip(*((row["step"], row["episode_return"]) for row in self.history)))
        axes.set(title=f"{NAME} on {self.args.env}, seed {self.args.seed}",
                 xlabel="environment steps", ylabel="return, mean of 20 episodes")
        self.write("learning_curve.png", lambda path: axes.figure.savefig(path, format="png"))


@clean_up()
def load_agent(run, **changes):
    """The agent of the run folder `run`, and its Args with these changes: agent, args."""
    args = Args(**load_checkpoint(run)["args"] | changes)
    envs = VecEnv(args.env, 1, setup(args))
    agent = Agent(envs.obs_space, envs.action_space, args).to(envs.device)
    load_checkpoint(run, envs.device, agent=agent)
    return agent, args


@clean_up()
def evaluate(agent, args, episodes=100, **kwargs):
    """The returns (episodes,) of the deterministic policy on fresh episodes; kwargs: of gym.make.

    Each environment plays equally many, so that short episodes do not count more often."""
    torch.set_num_threads(args.threads)
    returns, next_print = [[] for _ in range(min(episodes, 20))], time.time() + 60
    envs = VecEnv(args.env, len(returns), next(agent.parameters()).device, **kwargs)
    envs.reset(seed_everything(args.seed, 0, 0, 1))  # the 1: other episodes than in training
    while (done := min(map(len, returns)) * len(returns)) < episodes:
        if hasattr(agent, "reset"):  # a planner forgets its plans where an episode starts
            agent.reset(envs.episode_starts)
        envs.step(agent.act(envs.obs, deterministic=True))
        for i, episode_return, _ in envs.episodes:
            returns[i].append(episode_return)
        envs.episodes.clear()
        if time.time() > next_print:
            print(f"evaluation: {done} of {episodes} episodes", flush=True)
            next_print = time.time() + 60
        if Run.stop_signal:
            raise SystemExit(128 + Run.stop_signal)
    return np.array(list(zip(*returns))).flatten()[:episodes]


def parse_args():
    """The command line: what to do, and the settings that are given."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--env ENV] [...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{NAME}.py: {message}\n")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", metavar="RUN", type=pathlib.Path, help="resume a run")
    group.add_argument("--evaluate", metavar="RUN", type=pathlib.Path, help="score a run's agent")
    parser.add_argument("--episodes", help="episodes to score (100)", default=100, type=int)
    parser.add_argument("--video", help="film an episode", action="store_true")
    parser.add_argument("--render", help="show an episode", action="store_true")
    for f in fields(Args):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else {}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} ({f.default})", **kind)
    options = parser.parse_args()
    given = {f.name: getattr(options, f.name) for f in fields(Args) if f.name in options}
    for name in given:
        if options.resume and name == "run_dir" or options.evaluate and name not in (
                "env", "seed", "device", "threads"):
            parser.error(f"{name} has no effect here")
    if options.episodes < 1:
        parser.error("episodes is at least 1")
    return options, given


def main():
    def request_stop(number, frame):
        Run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one kills

    sys.path += {os.getcwd()} - set(sys.path)  # where the module of module:Env-v0 may be
    np.seterr(over="ignore")  # what overflows becomes inf, which VecEnv refuses
    options, given = parse_args()
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    try:
        folder = options.resume or options.evaluate  # a Path, which is true even if it is empty
        if folder:
            given = load_checkpoint(folder)["args"] | given | dict(run_dir=folder)
        args, trained = Args(**given), ""
        if options.evaluate:
            agent, _ = load_agent(folder, **given)
        else:
            args.run_dir = args.run_dir or "runs/{}__{}__{}__{}".format(
                re.sub("[:/]", "-", args.env), NAME, args.seed, time.time_ns() // 10**6)
            agent, history = train(args, folder)
            step, seconds = history[-1]["step"], history[-1]["seconds"]
            trained = f", {step:,} steps in {seconds:.1f} s, {step / seconds:,.0f} steps/s"
        if WORLD_SIZE > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if RANK == 0:
            returns = evaluate(agent, args, options.episodes)
            print(f"{args.env}: return {returns.mean():.1f} +/- {returns.std():.1f} over "
                  f"{len(returns)} episodes{trained}; {args.run_dir}", flush=True)
            if options.video:
                film = functools.partial(gym.wrappers.RecordVideo, episode_trigger=lambda i: i == 0,
                                         video_folder=f"{args.run_dir}/videos")
                evaluate(agent, args, 1, wrappers=[film], render_mode="rgb_array")
            if options.render:
                evaluate(agent, args, 1, render_mode="human")
    except (UserError, FloatingPointError, ImportError, gym.error.Error, BrokenPipeError) as error:
        print(f"{CLEAR}{NAME}.py:", " ".join(str(error).split())[:500], file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except Exception as error:  # a bug here or in the environment: show where
        hint = "; without a display MuJoCo needs MUJOCO_GL=egl" * (options.video or options.render)
        print(f"{CLEAR}{NAME}.py failed on {args.env}: {error}{hint}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(2)


train = clean_up()(train)  # here, as a decorator above would need the plumbing to come first

if __name__ == "__main__":
    main()

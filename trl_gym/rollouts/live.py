"""The collector of a run: live rollouts on its NeMo Gym, that outlive the policy server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trl_gym.rollouts.budgets import budgets_from_options
from trl_gym.rollouts.call_records import ledger_for
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.survivors import Recover, SurvivingCollector

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig
    from trl_gym.run.servers import RunServers


def live_collector(
    args: GymGRPOConfig,
    servers: RunServers,
    recover: Recover,
    *,
    version: Callable[[], str],
    after: Callable[[], None],
) -> SurvivingCollector:
    """Put together what the configuration says about rollouts.

    Args:
        args: The trainer's configuration.
        servers: The run's, ready.
        recover: See `SurvivingCollector`.
        version: See `SurvivingCollector`.
        after: See `SurvivingCollector`.

    Raises:
        ConfigError: `gym_environments` names an agent that is not there.
    """
    policy, gym = servers.policy, servers.gym
    budgets = budgets_from_options(
        deadline_s=args.gym_deadline,
        max_inflight=args.gym_max_inflight,
        retries=args.gym_retries,
        launch_rate=args.gym_launch_rate,
        environments=args.gym_environments,
    )
    budgets.check_agents(gym.agents)
    live: RolloutCollector[Rollout] = RolloutCollector(
        gym.agent,
        budgets=budgets,
        check=servers.check,
        agents_down=gym.agents_down,
        on_environment_down=args.gym_on_environment_down,
        gym_log=gym.log_end,
        ledger=ledger_for(policy.base_url, policy.client.api_key) if policy.keeps_records else None,
        stall_timeout_s=args.gym_stall_timeout,
    )
    return SurvivingCollector(
        live,
        recover,
        version=version,
        before=servers.check_before_rollouts,
        after=after,
        cancel=policy.client.cancel_rollouts if policy.keeps_records else lambda rollout_ids: None,
    )

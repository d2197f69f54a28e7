"""Replicas that are lost, and what becomes of their requests."""

from itertools import islice
from random import Random

from emberkv.sim.outcome import Status
from emberkv.sim.simulator import Outage, RandomOutages, outages
from tests.sim.build import run, single
from tests.workload.build import span

MS = 1_000_000
TWO = {"replicas": 2, "routing": "least-loaded"}


def test_a_request_in_flight_is_taken_over_by_another_replica() -> None:
    ran = run([single("a", 100, 10)], **TWO, outages=[{"replica": 0, "at": 0.15}])
    outcome = ran.outcomes["a"]
    assert (outcome.status, outcome.retries, outcome.replica) == (Status.COMPLETED, 1, 1)
    assert outcome.first_token == (150 + 100) * MS, "of the attempt that succeeded, counted from arrival"
    assert outcome.completion == (150 + 100 + 90) * MS
    assert (outcome.prefilled_tokens, outcome.output_tokens) == (200, 10)
    ran.check_idle()


def test_out_of_retries_a_request_fails_and_the_rest_go_on() -> None:
    lost = [{"replica": 0, "at": 0.05, "down_for": 0.0}, {"replica": 0, "at": 0.1, "down_for": 0.0}]
    ran = run([single("a", 100, 10), single("b", 100, 10, at=0.06)], outages=lost, max_retries=1)
    assert (ran.outcomes["a"].status, ran.outcomes["a"].retries) == (Status.FAILED, 1)
    assert ran.outcomes["a"].completion is None
    assert (ran.outcomes["b"].status, ran.outcomes["b"].retries) == (Status.COMPLETED, 1)
    ran.check_idle()


def test_a_replica_comes_back_empty() -> None:
    head = span("head", 100)
    pair = [single("a", 101, 1, head), single("b", 101, 1, head, at=2)]
    assert run(pair).cached("b") == (100, 1)
    assert run(pair, outages=[{"replica": 0, "at": 1.0, "down_for": 0.5}]).cached("b") == (0, 101)


def test_requests_wait_while_no_replica_is_up() -> None:
    ran = run([single("a", 100, 1, at=1)], outages=[{"replica": 0, "at": 0.5, "down_for": 4.5}])
    assert ran.outcomes["a"].first_token == 5_100 * MS
    assert ran.outcomes["a"].retries == 0


def test_where_none_comes_back_requests_are_unfinished() -> None:
    ran = run([single("a", 100, 1, at=1)], outages=[{"replica": 0, "at": 0.5}])
    assert ran.outcomes["a"].status is Status.UNFINISHED


def test_a_router_forgets_what_a_lost_replica_had() -> None:
    head = span("head", 100)
    requests = [single("a", 101, 1, head), single("b", 101, 1, head, at=1), single("c", 101, 1, head, at=3)]
    lost = [{"replica": 0, "at": 2.0, "down_for": 0.5}]
    ran = run(requests, replicas=2, routing="longest-prefix", outages=lost)
    assert [ran.outcomes[name].replica for name in "abc"] == [0, 0, 0]
    assert ran.cached("b") == (100, 1)
    assert ran.cached("c") == (0, 101)


def test_random_outages_have_the_means_they_were_given() -> None:
    found = list(islice(RandomOutages(10.0, 2.0).of(3, Random(1)), 4000))
    assert {each.replica for each in found} == {3}
    downs = [each.down_for or 0.0 for each in found]
    assert abs(sum(downs) / len(downs) - 2.0) < 0.1
    ups = [later.at - each.at - down for each, later, down in zip(found, found[1:], downs, strict=False)]
    assert abs(sum(ups) / len(ups) - 10.0) < 0.5


def test_outages_that_are_planned_come_in_order_for_each_replica() -> None:
    planned = [Outage(1, 5.0, 1.0), Outage(0, 3.0, 1.0), Outage(1, 2.0, 1.0)]
    found = [list(each) for each in outages(planned, None, 2, Random(1))]
    assert [[each.at for each in own] for own in found] == [[3.0], [2.0, 5.0]]


def test_gateways_take_requests_in_turn_and_each_makes_its_own_decisions() -> None:
    ran = run(
        [single(name, 10, 1, at=at) for at, name in enumerate("abcd")], replicas=2, routing="round-robin", gateways=2
    )
    assert [ran.outcomes[name].replica for name in "abcd"] == [0, 0, 1, 1]


def test_every_gateway_knows_what_replicas_have_and_forgets_what_is_lost() -> None:
    head = span("head", 100)
    requests = [single(name, 101, 1, head, at=at) for at, name in enumerate("abcde")]
    lost = [{"replica": 0, "at": 2.5, "down_for": 0.1}]
    ran = run(requests, replicas=2, routing="longest-prefix", gateways=2, outages=lost)
    assert [ran.cached(name) for name in "abcde"] == [(0, 101), (100, 1), (100, 1), (0, 101), (100, 1)]

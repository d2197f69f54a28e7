"""Hardware profiles: each number has a source, curves never reward more work, files read back as written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from emberkv.errors import ConfigError
from emberkv.sim.hardware import Curve, dump_profile, load_profile, parse_profile, profile_names
from tests.sim.flat import FLAT

NEEDED = {"h100", "h200", "a100", "l40s", "rtx4090", "m3-ultra", "m4-max", "cpu-2core"}


def text_of(**changes: Any) -> str:
    return yaml.safe_dump(yaml.safe_load(dump_profile(FLAT)) | changes)


def test_the_profiles_that_are_promised_are_there() -> None:
    assert set(profile_names()) >= NEEDED


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_is_complete_and_reads_back_as_written(name: str) -> None:
    profile = load_profile(name)
    assert parse_profile(dump_profile(profile)) == profile
    assert all(source.strip() for source in profile.sources.values())


def test_a_file_is_a_profile_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_profile(FLAT))
    assert load_profile(str(path)) == FLAT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": {}}, "sources does not say where .*memory_gib"),
        ({"memory": 3}, "unknown: memory; accepted: name"),
        ({"gemm_bandwidth": 1.5}, "gemm_bandwidth"),
        ({"peak_tflops": {"fp5": 1.0}}, "fp5 is not among fp8, bf16"),
        ({"gemm_compute": [[8, 0.5], [8, 0.6]]}, "gemm_compute: size 8 comes after 8; sizes must rise"),
        ({"gemm_compute": [[8, 0.2], [16, 0.9]]}, "16 at 0.9 would take less time than 8 at 0.2"),
        ({"decode_attention": [[1, 2.0]]}, "decode_attention: shares must be at most 1"),
        ({"passes": "some"}, "passes"),
    ],
)
def test_a_profile_that_makes_no_sense_says_why(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_profile(text_of(**changes))


def test_prefill_may_gain_more_than_it_grows_as_its_work_is_quadratic() -> None:
    profile = parse_profile(text_of(prefill_attention=[[8, 0.2], [16, 0.7]]))
    assert profile.prefill_attention == [[8, 0.2], [16, 0.7]]


def test_what_is_not_yaml_is_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.yaml: it is not YAML"):
        load_profile(str(path))
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_profile(str(tmp_path / "absent.yaml"))


def test_an_unknown_name_is_answered_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"no hardware 'abacus'; give a \.yaml file or one of a100"):
        load_profile("abacus")


def test_a_number_type_is_computed_in_the_next_that_the_device_has() -> None:
    assert load_profile("h100").flops("fp8") == 1978.9e12
    assert load_profile("a100").flops("fp8") == 312e12
    with pytest.raises(ConfigError, match="no peak for fp32; it has bf16"):
        parse_profile(text_of(peak_tflops={"bf16": 1.0})).flops("fp32")


def test_a_curve_is_straight_on_logarithmic_axes_and_level_outside() -> None:
    curve = Curve([[10, 0.1], [1000, 0.9]])
    assert curve.at(1) == curve.at(10) == 0.1
    assert curve.at(1000) == curve.at(1e9) == 0.9
    assert curve.at(100) == pytest.approx((0.1 * 0.9) ** 0.5)
    assert Curve([[5, 0.5]]).at(77) == 0.5

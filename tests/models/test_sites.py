from __future__ import annotations

import pytest

import logitlab as ll
from logitlab.models.sites import KINDS, Site, SiteSpec, normalise_request, parse_spec, select_layers


def test_names_come_back() -> None:
    for site in (Site(3, "resid_post"), Site(0, "head_out", 7)):
        spec = parse_spec(str(site))
        assert spec == SiteSpec(site.layer, site.kind, site.index)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2.mlp_out", [2]),
        ("-1.mlp_out", [4]),
        ("mlp_out", [0, 1, 2, 3, 4]),
        ("::2.mlp_out", [0, 2, 4]),
        ("1:3.mlp_out", [1, 2]),
        ("-2:.mlp_out", [3, 4]),
        (" 1.mlp_out ", [1]),
    ],
)
def test_layers(text: str, layers: list[int]) -> None:
    assert select_layers(parse_spec(text), 5) == layers


@pytest.mark.parametrize(
    "text", ["", "1", "1.", ".mlp_out", "1.mlp_out.x", "1.2.mlp_out", "a.mlp_out", "::0.mlp_out", "1.MLP"]
)
def test_malformed(text: str) -> None:
    with pytest.raises(ll.InputError):
        select_layers(parse_spec(text), 5)


def test_requests() -> None:
    resid = [SiteSpec(0, "resid_pre", None), SiteSpec(None, "resid_post", None)]
    assert normalise_request(None) == resid
    assert normalise_request("resid") == resid
    assert normalise_request("1.mlp_out, 2.attn_out") == [parse_spec("1.mlp_out"), parse_spec("2.attn_out")]
    assert normalise_request([Site(1, "neuron", 3), "resid"]) == [SiteSpec(1, "neuron", 3), *resid]
    with pytest.raises(ll.InputError, match="no site was named"):
        normalise_request([])


def test_sites_are_in_order_of_depth(llama: ll.Model) -> None:
    sites = llama.select_sites("resid,neuron,mlp_out,head_out,attn_out,resid_pre")
    assert [s.layer for s in sites] == sorted(s.layer for s in sites)
    assert len(sites) == len(set(sites)) == 3 * (4 + 4 + 48)
    first = [s.kind for s in sites if s.layer == 0 and s.index in (None, 0)]
    assert first == [k for k in KINDS if k != "cross_attn_out"]

"""What an address may say, and which addresses may be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_router.catalog.sources.address import parse, redacted
from adapter_router.catalog.sources.policy import Policy
from adapter_router.errors import AdapterRejected
from adapter_router.types import Source


def problems(uri: str, revision: str | None = None, sha256: str | None = None) -> tuple[str, ...]:
    with pytest.raises(AdapterRejected) as caught:
        parse(Source(uri, revision, sha256))
    return caught.value.problems


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("/srv/a", "/srv/a"),
        ("a:b/c", "a:b/c"),
        ("file:///srv/a%20b", "/srv/a b"),
        ("FILE://localhost/srv/a", "/srv/a"),
        ("package:food/adapters/a", "package:food/adapters/a"),
        ("hf://org/name", "hf://org/name"),
        ("hf://models/org/name@v1/sub/folder/", "hf://org/name@v1/sub/folder"),
        ("hf://org/name@refs%2Fpr%2F1", "hf://org/name@refs/pr/1"),
        ("S3://Bucket/a/b/", "s3://Bucket/a/b"),
        ("s3://bucket/50%25 é", "s3://bucket/50%25 é"),
        ("gs://bucket", "gs://bucket/"),
        ("az://container/a", "az://container/a"),
        ("HTTPS://Example.COM:443/a%2Db/%C3%A9/", "https://example.com/a-b/%C3%A9"),
        ("https://example.com.:8443/a@b", "https://example.com:8443/a@b"),
        ("https://[2001:DB8::1]/a", "https://[2001:db8::1]/a"),
        ("http://127.0.0.1:80/a", "http://127.0.0.1/a"),
    ],
)
def test_an_address_has_one_form(uri: str, told: str) -> None:
    assert str(parse(Source(uri))) == told


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("", "empty"),
        ("/a\0b", "NUL"),
        ("ftp://host/a", "'ftp' is no kind of address"),
        ("s3:bucket/a", "'s3' is no kind of address"),
        ("package://food", "'package' is no kind of address"),
        ("file://host/a", "three slashes"),
        ("file:///a%00b", "no path should have"),
        ("file:///a%ffb", "no path should have"),
        ("file:///a?b", "%3F"),
        ("https://", "no host"),
        ("https:///a", "no host"),
        ("https://host:99999/a", "no host"),
        ("https://ho st/a", "no host"),
        ("https://exämple.com/a", "no host"),
        ("https://example.com\u3002evil.com/a", "no host"),
        ("https://-example.com/a", "no host"),
        ("https://host/a?X-Amz-Signature=hush", "secretRef"),
        ("https://host/a#hush", "secretRef"),
        ("https://me:hush@host/a", "secretRef"),
        ("https:/me:hush@host/a", "'https' is no kind of address"),
        ("https://me:x/hush@host/a", "no host"),
        ("s3://key:x/hush@bucket/a", "secretRef"),
        ("s3:key:hush@bucket/a", "'s3' is no kind of address"),
        ("https://host/a//b", "empty part"),
        ("https://host/a/../b", ". or .."),
        ("https://host/a/%2e%2E/b", ". or .."),
        ("https://host/a/%252e%252e/b", ". or .."),
        ("https://host/a%2f..%2fb", "encoded slash"),
        ("https://host/a%5c..%5cb", "encoded slash"),
        ("https://host/a\\b", "encoded slash"),
        ("https://host/a%00b", "cannot be printed"),
        ("https://host/a%0d%0aHost:%20evil", "cannot be printed"),
        ("https://host/\u202eb", "cannot be printed"),
        ("s3://", "s3://bucket/path"),
        ("s3://me:hush@bucket/a", "secretRef"),
        ("s3://bucket/a/../../others", ". or .."),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/a?versionId=1", "? and #"),
        ("az://me:hush@container/a", "az://container/path"),
        ("hf://name", "hf://organisation/name"),
        ("hf://org/name@", "no branch"),
        ("hf://org/name@a..b", "no branch"),
        ("hf://org/name/../other/name", ". or .."),
        ("hf://o rg/name", "letters"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(uri: str, told: str) -> None:
    found = problems(uri)
    assert any(told in problem for problem in found), found
    assert "hush" not in "".join(found)


def test_every_problem_is_listed() -> None:
    found = problems("https://me:hush@ho st/a//../b?sig=hush", "main", "0xabc")
    assert len(found) == 7 and "hush" not in str(found)


@pytest.mark.parametrize("uri", ["/srv/a", "s3://bucket/a", "https://host/a"])
def test_only_the_hub_has_revisions(uri: str) -> None:
    assert "only hf:// has revisions" in problems(uri, "main")[0]


@pytest.mark.parametrize("revision", ["", "a b", "../x", "a\n"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(revision: str) -> None:
    assert "no branch, tag or commit" in problems("hf://org/name", revision)[0]


def test_two_revisions_must_agree() -> None:
    assert str(parse(Source("hf://org/name@v1", "v1"))) == "hf://org/name@v1"
    assert "but the address says 'v1'" in problems("hf://org/name@v1", "v2")[0]


@pytest.mark.parametrize("pin", ["", "abc", "sha256:" + "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_a_pin_is_a_sha256(pin: str) -> None:
    assert "hexadecimal" in problems("/a", sha256=pin)[0]


def test_what_is_shown_has_no_credentials() -> None:
    assert redacted("https://me:hush@host/a?sig=hush&x#hush") == "https://***@host/a?***"
    assert redacted("s3://key:hush@bucket/a@b") == "s3://***@bucket/a@b"
    assert redacted("https://a@b@host/a") == "https://***@host/a"
    assert redacted("/srv/a?b@c") == "/srv/a?b@c"
    assert redacted("hf://org/name@v1/a:b@c") == "hf://org/name@v1/a:b@c"
    assert redacted("https://[2001:db8::1]:8443/a@b") == "https://[2001:db8::1]:8443/a@b"
    assert redacted("https://host:8443/a@b") == "https://host:8443/a@b"


# -- the allow-list ------------------------------------------------------------------------------------------------


def allows(policy: Policy, uri: str) -> bool:
    try:
        policy.check(parse(Source(uri)))
    except AdapterRejected as error:
        assert "not below any prefix" in str(error) or "leads out of its package" in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("s3://bucket/a", ["s3://bucket/a", "s3://bucket/a/b"], ["s3://bucket/ab", "s3://bucket", "s3://Bucket/a"]),
        ("s3://bucket/", ["s3://bucket/a"], ["s3://bucket2/a", "gs://bucket/a", "https://bucket/a"]),
        ("gs://", ["gs://bucket/a"], ["s3://bucket/a"]),
        ("hf://org", ["hf://org/name", "hf://org/name@v1/sub"], ["hf://orgs/name", "hf://evil/org"]),
        ("hf://org/name", ["hf://org/name@v1"], ["hf://org/name2", "hf://org/Name"]),
        (
            "https://host/a",
            ["https://HOST:443/a/b", "https://host/%61/b"],
            ["https://host/ab", "http://host/a", "https://host:8443/a", "https://host.evil.com/a", "https://host"],
        ),
        ("https://", ["https://anywhere/a"], ["http://anywhere/a"]),
        ("http://127.0.0.1:8080/", ["http://127.0.0.1:8080/a"], ["http://127.0.0.1/a", "http://localhost:8080/a"]),
    ],
)
def test_a_prefix_is_compared_part_by_part(prefix: str, inside: list[str], outside: list[str]) -> None:
    policy = Policy([prefix])
    assert [uri for uri in inside if not allows(policy, uri)] == []
    assert [uri for uri in outside if allows(policy, uri)] == []


def test_paths_are_followed_to_where_they_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open/a", "open2", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "open" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "way").symlink_to(tmp_path / "open")
    monkeypatch.chdir(tmp_path)
    for prefix in (str(tmp_path / "open"), f"file://{tmp_path}/open", f"{tmp_path}/way/"):
        policy = Policy([prefix])
        inside = [f"{tmp_path}/open/a", f"file://{tmp_path}/open/a", "open/a", "way/a", f"{tmp_path}/secret/../open/a"]
        outside = [
            f"{tmp_path}/open/out",
            f"{tmp_path}/open2",
            f"{tmp_path}/open/../secret",
            f"file://{tmp_path}/open/%2e%2e/secret",
            "/etc",
            "file:////etc",
            "package:adapter_router",
        ]
        assert [uri for uri in inside if not allows(policy, uri)] == []
        assert [uri for uri in outside if allows(policy, uri)] == []


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert not allows(Policy(["/srv"]), str(tmp_path / "circle"))


def test_a_package_ends_where_it_ends() -> None:
    policy = Policy(["package:"])
    assert allows(policy, "package:deployments/demo")
    assert not allows(policy, "package:deployments/../../etc")
    assert not allows(policy, "/etc")
    assert allows(Policy(["package:deployments/demo"]), "package:deployments/demo/adapters")
    assert not allows(Policy(["package:deployments/demo"]), "package:deployments/configs")
    with pytest.raises(AdapterRejected, match="no package 'nowhere' is installed"):
        policy.check(parse(Source("package:nowhere/a")))


def test_nothing_is_allowed_by_an_empty_list(tmp_path: Path) -> None:
    assert not allows(Policy([]), str(tmp_path)) and not allows(Policy([]), "https://host/a")


def test_every_wrong_prefix_is_listed() -> None:
    with pytest.raises(ValueError, match="SourceConfig: allowed") as caught:
        Policy(["ftp://host", "https://me:hush@host/", "hf://org/name@v1", "package:nowhere", "s3://ok", ""])
    text = str(caught.value)
    for told in ("'ftp'", "secretRef", "a prefix has no revision", "'nowhere' is installed", "empty"):
        assert told in text
    assert "hush" not in text


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "100.64.0.1",
        "::",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "fec0::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_only_a_host_that_is_named_may_have_a_private_address(ip: str) -> None:
    address = parse(Source("https://inside:8443/a"))
    with pytest.raises(AdapterRejected, match="not a public address"):
        Policy(["https://", "https://inside/", "https://other:8443/"]).check_ip(address, ip)
    Policy(["https://inside:8443/b"]).check_ip(address, ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "2606:4700::1111"])
def test_any_host_may_have_a_public_address(ip: str) -> None:
    Policy(["https://"]).check_ip(parse(Source("https://outside/a")), ip)

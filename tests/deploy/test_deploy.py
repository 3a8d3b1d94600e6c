"""The stacks and the registry as infra/deploy.py makes them, in moto on a socket; tests/image pushes a real image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from function.settings import ROOT
from infra import deploy as script
from infra.deploy import DeployError, Stacks, curl, deploy_function, push

SCRIPT = ROOT / "infra" / "deploy.py"
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS:UserWarning")

TEMPLATE = """
Parameters:
  Title: {Type: String, Default: first}
  Days: {Type: Number, Default: 7}
Resources:
  Parameter:
    Type: AWS::SSM::Parameter
    Properties: {Name: !Sub "/${AWS::StackName}", Type: String, Value: !Sub "${Title} ${Days}"}
Outputs:
  Both: {Value: !Sub "${Title} ${Days}"}
"""

FUNCTION = """
Parameters:
  ImageUri: {Type: String}
  ModelBucket: {Type: String}
  ModelKey: {Type: String}
  EphemeralStorage: {Type: Number}
  PromptCacheBucket: {Type: String}
Resources:
  Parameter:
    Type: AWS::SSM::Parameter
    Properties: {Name: /function, Type: String, Value: !Sub "${EphemeralStorage} ${PromptCacheBucket}"}
Outputs:
  FunctionUrl: {Value: "https://abc.lambda-url.eu-west-1.on.aws/"}
"""


def deploy(aws: dict[str, str], *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, env=aws, input=stdin, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.yaml"
    path.write_text(TEMPLATE)
    return path


def last_update(name: str) -> Any:
    client: Any = boto3.client("cloudformation")
    return client.describe_stack_events(StackName=name)["StackEvents"][0]["EventId"]


@pytest.mark.usefixtures("aws")
def test_a_stack_is_made_changed_and_left_alone(template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacks = Stacks("test")
    assert stacks.find("function") is None
    assert stacks.deploy("function", template, {"Days": "3"})["Both"] == "first 3"
    made = last_update("test-function")
    assert stacks.deploy("function", template)["Both"] == "first 3"
    assert last_update("test-function") == made
    assert "test-function is as it should be" in capsys.readouterr().err
    # The 3 is not given again.
    assert stacks.deploy("function", template, {"Title": "second"})["Both"] == "second 3"


@pytest.mark.usefixtures("aws")
def test_wrong_parameters_are_told(template: Path) -> None:
    with pytest.raises(DeployError, match="no such parameter: Colour; there are Days, Title"):
        Stacks("test").deploy("function", template, {"Colour": "red"})
    assert Stacks("test").find("function") is None


@pytest.mark.usefixtures("aws")
def test_a_template_that_is_too_large(template: Path) -> None:
    template.write_text(TEMPLATE + "#" * 51_200)
    with pytest.raises(DeployError, match="must have at most 51,200 bytes, got 51,"):
        Stacks("test").deploy("function", template)


def test_the_bucket_is_made_once(aws: dict[str, str]) -> None:
    first, again = (deploy(aws, "--prefix", "test", "bucket") for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert first.stdout == again.stdout
    assert "test-models: making it" in first.stderr
    assert "test-models is as it should be" in again.stderr
    s3: Any = boto3.client("s3")
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == [first.stdout.strip()]


@pytest.mark.usefixtures("aws")
def test_an_image_that_is_in_the_registry_is_not_pushed() -> None:
    ecr: Any = boto3.client("ecr")
    repository = ecr.create_repository(repositoryName="bitnet-lambda")["repository"]["repositoryUri"]
    asked: list[tuple[str, ...]] = []

    def container(*arguments: str, stdin: str | None = None) -> str:
        asked.append((*arguments, *([stdin] if stdin else [])))
        return "sha256:0123456789abcdef0123456789abcdef\n"

    uri = f"{repository}:0123456789ab"
    assert push("local", repository, container) == uri
    registry = repository.split("/")[0]
    assert [call[:1] for call in asked] == [("image",), ("login",), ("tag",), ("push",)]
    assert asked[1][:5] == ("login", "--username", "AWS", "--password-stdin", registry)
    assert asked[3] == ("push", uri)
    manifest = '{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": []}'
    ecr.put_image(repositoryName="bitnet-lambda", imageManifest=manifest, imageTag="0123456789ab")
    asked.clear()
    assert push("local", repository, container) == uri
    assert [call[:2] for call in asked] == [("image", "inspect")]


def test_a_model_that_is_not_there_stops_before_anything_is_made(aws: dict[str, str]) -> None:
    done = deploy(aws, "function", "--model", "s3://nowhere/models/none.gguf")
    assert done.returncode == 1
    assert "HeadObject" in done.stderr
    done = deploy(aws, "function", "--model", "models/none.gguf")
    assert "--model must be s3://bucket/key, got 'models/none.gguf'" in done.stderr
    assert Stacks("bitnet").find("registry") is None


@pytest.mark.usefixtures("aws")
def test_storage_is_sized_by_the_model_and_the_prompt_cache(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template.write_text(FUNCTION)
    monkeypatch.setattr(script, "run_container", lambda *_, **__: "sha256:0123456789abcdef\n")
    s3: Any = boto3.client("s3")
    s3.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    s3.put_object(Bucket="models", Key="model.gguf", Body=bytes(3_000_001))
    stacks = Stacks("test")
    cache, no_cache = {"PromptCacheBucket": "cache"}, {"PromptCacheBucket": ""}
    sizes = []
    for given in (no_cache, cache, {}, no_cache, cache | {"EphemeralStorage": "600"}):
        deploy_function(stacks, "s3://models/model.gguf", "local", template, given)
        sizes.append(stacks.parameters("function")["EphemeralStorage"])
    assert sizes == ["512", "741", "741", "512", "600"]


def test_wrong_arguments_are_told(aws: dict[str, str]) -> None:
    done = deploy(aws, "function", "--model", "s3://a/b", "MemorySize")
    assert done.returncode == 2
    assert "must be NAME=VALUE, got 'MemorySize'" in done.stderr


def test_destroy_asks(aws: dict[str, str], template: Path) -> None:
    stacks = Stacks("test")
    for part in ("models", "function", "batch"):
        stacks.deploy(part, template, {"Title": part})
    for answer in ("", "yes\n", "bitnet\n"):
        done = deploy(aws, "--prefix", "test", "destroy", stdin=answer)
        assert done.returncode == 1
        assert "to be deleted: test-function, test-batch" in done.stderr
        assert "nothing was deleted" in done.stderr
    assert all(stacks.find(part) for part in ("models", "function", "batch"))
    assert deploy(aws, "--prefix", "test", "destroy", stdin="test\n").returncode == 0
    assert [bool(stacks.find(part)) for part in ("models", "function", "batch")] == [True, False, False]
    done = deploy(aws, "--prefix", "test", "destroy", "--all", "--yes")
    assert done.returncode == 0
    assert "bucket and registry themselves stay" in done.stderr
    assert stacks.find("models") is None
    done = deploy(aws, "--prefix", "test", "destroy", stdin="")
    assert (done.returncode, "there is nothing to delete" in done.stderr) == (0, True)


def test_the_bucket_outlives_its_stack(aws: dict[str, str]) -> None:
    bucket = deploy(aws, "--prefix", "test", "bucket").stdout.strip()
    assert deploy(aws, "--prefix", "test", "destroy", "--all", "--yes").returncode == 0
    s3: Any = boto3.client("s3")
    assert [found["Name"] for found in s3.list_buckets()["Buckets"]] == [bucket]


def test_the_line_for_curl() -> None:
    url = "https://abc.lambda-url.eu-west-1.on.aws/"
    assert '--aws-sigv4 "aws:amz:eu-west-1:lambda"' in curl(url, signed=True)
    assert f"{url}completion --data" in curl(url, signed=True)
    assert "Bearer $BITNET_API_KEY" in curl(url, signed=False)
    assert "sigv4" not in curl(url, signed=False)

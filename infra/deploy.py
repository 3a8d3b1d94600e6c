#!/usr/bin/env python3
"""Make the stacks of this folder and of template.yaml in their order, and delete them: `make deploy`, `make destroy`.

    python infra/deploy.py bucket                                    the name of the models' bucket, made if need be
    python infra/deploy.py function --model s3://… [NAME=VALUE …]    registry, image, and the function with its URL
    python infra/deploy.py destroy [--all] [--yes]

Whatever is as it should be already is left alone. Account and region are those that boto3 finds.
"""

from __future__ import annotations

import argparse
import base64
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTAINER = ROOT / "build" / "image" / "container"
TEMPLATE_BYTES = 51_200  # https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/cloudformation-limits.html
SPARE_MB = 200  # of /tmp, beside the model
PROMPT_CACHE_MB = 537  # of /tmp, where there is a prompt cache: the default of PROMPT_CACHE_BYTES
TABLE = "  {:20} {}"


class DeployError(Exception):
    """A step that cannot be taken: one line that says why."""


class Stacks:
    """The stacks whose names begin with `prefix` and a hyphen."""

    def __init__(self, prefix: str) -> None:
        import boto3

        self.prefix = prefix
        self._client: Any = boto3.client("cloudformation")

    def name(self, part: str) -> str:
        """The name of the stack of a part: models, registry, function, batch."""
        return f"{self.prefix}-{part}"

    def find(self, part: str) -> dict[str, Any] | None:
        """What CloudFormation says of the stack, if it is there."""
        from botocore.exceptions import ClientError

        try:
            (stack,) = self._client.describe_stacks(StackName=self.name(part))["Stacks"]
        except ClientError as error:
            if "does not exist" in str(error):
                return None
            raise
        return dict(stack)

    def outputs(self, part: str) -> dict[str, str]:
        """Raises DeployError where the stack is not there."""
        stack = self.find(part)
        if stack is None:
            raise DeployError(f"there is no stack {self.name(part)}")
        return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}

    def parameters(self, part: str) -> dict[str, str]:
        """Those that the stack has; none where it is not there."""
        return _values(self.find(part) or {})

    def deploy(self, part: str, template: Path, parameters: Mapping[str, str] | None = None) -> dict[str, str]:
        """Makes the stack, or changes what differs, and returns its outputs.

        Parameters that are not given keep the values they have in the stack.

        Raises:
            DeployError: the template or a parameter is wrong, or a resource cannot be made; the stack is as it was.
        """
        name, body, found = self.name(part), template.read_text(), self.find(part)
        if len(body.encode()) > TEMPLATE_BYTES:
            raise DeployError(f"{template} must have at most {TEMPLATE_BYTES:,} bytes, got {len(body.encode()):,}")
        if found and found["StackStatus"] in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "REVIEW_IN_PROGRESS"):
            raise DeployError(f"{name} was never made ({found['StackStatus']}): delete it, then start again")
        parameters = parameters or {}
        stack = {
            "StackName": name,
            "TemplateBody": body,
            "Parameters": self._parameters(body, parameters, found),
            "Capabilities": ["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
        }
        if not found:
            _say(f"{name}: making it")
            self._client.create_stack(**stack)
            self._wait(name, "stack_create_complete")
        elif self._differs(found, body, parameters) and self._update(stack):
            _say(f"{name}: changing it")
            self._wait(name, "stack_update_complete")
        else:
            _say(f"{name} is as it should be")
        return self.outputs(part)

    def delete(self, part: str) -> None:
        """Deletes the stack. Raises DeployError where something resists."""
        _say(f"{self.name(part)}: deleting it")
        self._client.delete_stack(StackName=self.name(part))
        self._wait(self.name(part), "stack_delete_complete")

    def _parameters(
        self, body: str, given: Mapping[str, str], found: Mapping[str, Any] | None
    ) -> list[dict[str, str | bool]]:
        known = {item["ParameterKey"] for item in self._client.get_template_summary(TemplateBody=body)["Parameters"]}
        if unknown := sorted(given.keys() - known):
            raise DeployError(f"no such parameter: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        kept = {item["ParameterKey"] for item in (found or {}).get("Parameters", [])} & known - given.keys()
        return [
            *({"ParameterKey": key, "ParameterValue": value} for key, value in given.items()),
            *({"ParameterKey": key, "UsePreviousValue": True} for key in sorted(kept)),
        ]

    def _differs(self, found: Mapping[str, Any], body: str, parameters: Mapping[str, str]) -> bool:
        template = self._client.get_template(StackName=found["StackName"], TemplateStage="Original")["TemplateBody"]
        return bool(template != body or not parameters.items() <= _values(found).items())

    def _update(self, stack: Mapping[str, Any]) -> bool:
        """Begins a change; False: there is none, as where comments differ."""
        from botocore.exceptions import ClientError

        try:
            self._client.update_stack(**stack)
        except ClientError as error:
            if "No updates are to be performed" not in str(error):
                raise
            return False
        return True

    def _wait(self, name: str, event: str) -> None:
        from botocore.exceptions import WaiterError

        try:
            self._client.get_waiter(event).wait(StackName=name, WaiterConfig={"Delay": 5, "MaxAttempts": 360})
        except WaiterError as error:
            events = self._client.describe_stack_events(StackName=name)["StackEvents"]
            reasons = [
                f"{item['LogicalResourceId']}: {item.get('ResourceStatusReason', item['ResourceStatus'])}"
                for item in reversed(events)
                if item["ResourceStatus"].endswith("_FAILED")
            ]
            raise DeployError(f"{name}: {'; '.join(reasons) or error}") from error


def push(image: str, repository: str, container: Callable[..., str]) -> str:
    """Pushes a local image and returns its URI. The tag is the image's own hash, so what is there is not pushed again.

    Args:
        image: its local name.
        repository: its URI in ECR.
        container: runs docker or podman and returns what it prints.
    """
    import boto3
    from botocore.exceptions import ClientError

    tag = container("image", "inspect", "--format", "{{.Id}}", image).strip().removeprefix("sha256:")[:12]
    uri = f"{repository}:{tag}"
    registry, _, name = repository.partition("/")
    ecr: Any = boto3.client("ecr")
    try:
        ecr.describe_images(repositoryName=name, imageIds=[{"imageTag": tag}])
        _say(f"{uri} is there")
        return uri
    except ClientError as error:
        if error.response["Error"]["Code"] != "ImageNotFoundException":
            raise
    (login,) = ecr.get_authorization_token()["authorizationData"]
    user, _, password = base64.b64decode(login["authorizationToken"]).decode().partition(":")
    container("login", "--username", user, "--password-stdin", registry, stdin=password)
    container("tag", image, uri)
    _say(f"pushing {uri}")
    container("push", uri)
    return uri


def run_container(*arguments: str, stdin: str | None = None) -> str:
    """Runs docker or podman, whichever answers. Raises DeployError where it fails."""
    done = subprocess.run([CONTAINER, *arguments], input=stdin, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise DeployError(f"'{CONTAINER.name} {arguments[0]}' failed with exit code {done.returncode}")
    return done.stdout


def deploy_function(
    stacks: Stacks, model: str, image: str, template: Path, parameters: Mapping[str, str]
) -> dict[str, str]:
    """Registry, image and function. Returns the outputs of template.yaml."""
    import boto3

    match = re.fullmatch(r"s3://([^/]+)/(.+)", model)
    if match is None:
        raise DeployError(f"--model must be s3://bucket/key, got '{model}'")
    size = boto3.client("s3").head_object(Bucket=match[1], Key=match[2])["ContentLength"]
    repository = stacks.deploy("registry", ROOT / "infra" / "registry.yaml")["RepositoryUri"]
    is_cached = bool((stacks.parameters("function") | {**parameters}).get("PromptCacheBucket"))
    values = {
        "ImageUri": push(image, repository, run_container),
        "ModelBucket": match[1],
        "ModelKey": match[2],
        "EphemeralStorage": str(max(512, -(-size // 10**6) + SPARE_MB + is_cached * PROMPT_CACHE_MB)),
    }
    outputs = stacks.deploy("function", template, values | {**parameters})
    for key, value in sorted(outputs.items()):
        print(TABLE.format(key, value))
    is_signed = stacks.parameters("function").get("AuthType", "AWS_IAM") == "AWS_IAM"
    print("\n" + curl(outputs["FunctionUrl"], signed=is_signed))
    return outputs


def curl(url: str, *, signed: bool) -> str:
    """The line that asks a deployed function for a tale."""
    region = re.search(r"\.lambda-url\.([a-z0-9-]+)\.", url)
    signature = (
        f'--aws-sigv4 "aws:amz:{region[1] if region else "REGION"}:lambda" '
        '--user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" --header "x-amz-security-token: $AWS_SESSION_TOKEN"'
    )
    who = signature if signed else '--header "Authorization: Bearer $BITNET_API_KEY"'
    body = '{"prompt": "Once upon a time", "n_predict": 40}'
    return f"curl {who} --header 'content-type: application/json' {url.rstrip('/')}/completion --data '{body}'"


def destroy(stacks: Stacks, *, everything: bool, sure: bool) -> None:
    """Deletes the stacks, what uses others first. Asks before, unless `sure`.

    Raises:
        DeployError: the answer was no, or a stack cannot be deleted.
    """
    parts = ["function", "batch", *(["registry", "models"] if everything else [])]
    found = [part for part in parts if stacks.find(part)]
    if not found:
        _say(f"there is nothing to delete: no {', '.join(stacks.name(part) for part in parts)}")
        return
    _say(f"to be deleted: {', '.join(stacks.name(part) for part in found)}")
    if everything:
        _say(
            "bucket and registry themselves stay, with what is in them: delete them by hand, "
            "the registry before it is made again"
        )
    if not sure:
        print(f"Type '{stacks.prefix}' to delete them: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip() != stacks.prefix:
            raise DeployError("nothing was deleted")
    for part in found:
        stacks.delete(part)


def _values(stack: Mapping[str, Any]) -> dict[str, str]:
    return {item["ParameterKey"]: item["ParameterValue"] for item in stack.get("Parameters", [])}


def _say(line: str) -> None:
    print(f"deploy: {line}", file=sys.stderr)


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got '{text}'")
    return name, value


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Make or delete the stacks.")
    parser.add_argument("--prefix", default="bitnet", help="the stacks' names begin with it (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bucket", help="make the models' bucket if need be, and tell its name")
    function = commands.add_parser("function", help="make the registry, push the image, make the function")
    function.add_argument("--model", required=True, help="s3://bucket/key")
    function.add_argument("--image", default="bitnet-lambda", help="local name of the image (%(default)s)")
    function.add_argument("--template", type=Path, default=ROOT / "template.yaml")
    function.add_argument("parameters", nargs="*", type=_parameter, metavar="NAME=VALUE", help="of the template")
    destroying = commands.add_parser("destroy", help="delete the stacks of the function and of the batch")
    destroying.add_argument("--all", action="store_true", help="those of the registry and of the models' bucket too")
    destroying.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args()
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        stacks = Stacks(arguments.prefix)
        if arguments.command == "bucket":
            print(stacks.deploy("models", ROOT / "infra" / "model-bucket.yaml")["BucketName"])
        elif arguments.command == "function":
            deploy_function(stacks, arguments.model, arguments.image, arguments.template, dict(arguments.parameters))
        else:
            destroy(stacks, everything=arguments.all, sure=arguments.yes)
    except (DeployError, BotoCoreError, ClientError, OSError) as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The stacks, made in moto's CloudFormation one after the other: outputs of one are parameters of the next.

moto leaves out OIDC providers, Function URLs, aliases, alarms and most properties of buckets; test_templates.py looks
at those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from tests.infra.templates import Template, template

REGION = "eu-west-1"
PREFIX = "bitnet-"
IMAGE_TAG = "v1"
KEY = "bitnet/2B-4T.gguf"

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS:UserWarning")


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, str]]]:
    """The outputs of all five."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        bucket = create("model-bucket", template("model-bucket"))
        registry = create("registry", template("registry"))
        role = create(
            "deploy-role",
            template("deploy-role"),
            Repository="owner/name",
            RepositoryArn=registry["RepositoryArn"],
            ModelBucketArn=bucket["BucketArn"],
        )
        batch = create("batch", template("batch"), FunctionName=f"{PREFIX}function")
        function = create(
            "function",
            without(template("function"), "FunctionUrl"),
            BatchBucket=batch["BucketName"],
            ImageUri=f"{registry['RepositoryUri']}:{IMAGE_TAG}",
            ModelBucket=bucket["BucketName"],
            ModelKey=KEY,
            PermissionsBoundary=role["BoundaryArn"],
        )
        yield {
            "model-bucket": bucket,
            "registry": registry,
            "deploy-role": role,
            "batch": batch,
            "function": function,
        }


def without(plain: Template, name: str) -> Template:
    """A template less one resource and the output of the same name."""
    return plain | {
        section: {key: value for key, value in plain[section].items() if key != name}
        for section in ("Resources", "Outputs")
    }


def create(name: str, plain: Template, **parameters: str) -> dict[str, str]:
    """Makes a stack and returns its outputs."""
    cloudformation = boto3.client("cloudformation")
    cloudformation.create_stack(
        StackName=PREFIX + name,
        TemplateBody=json.dumps(plain),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        Capabilities=["CAPABILITY_IAM"],
    )
    (stack,) = cloudformation.describe_stacks(StackName=PREFIX + name)["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}


def test_every_output_is_there(stacks: dict[str, dict[str, str]]) -> None:
    for name, outputs in stacks.items():
        assert outputs.keys() == template(name)["Outputs"].keys() - {"FunctionUrl"}
        assert all(outputs.values())


def test_the_bucket(stacks: dict[str, dict[str, str]]) -> None:
    s3: Any = boto3.client("s3")
    bucket = stacks["model-bucket"]["BucketName"]
    (rule,) = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"


def test_the_registry(stacks: dict[str, dict[str, str]]) -> None:
    ecr: Any = boto3.client("ecr")
    name = stacks["registry"]["RepositoryName"]
    (repository,) = ecr.describe_repositories(repositoryNames=[name])["repositories"]
    assert repository["imageTagMutability"] == "IMMUTABLE"


def test_the_function(stacks: dict[str, dict[str, str]]) -> None:
    outputs = stacks["function"]
    lambda_: Any = boto3.client("lambda")
    configuration = lambda_.get_function_configuration(FunctionName=outputs["FunctionName"])
    assert (configuration["MemorySize"], configuration["Timeout"]) == (10240, 300)
    bucket = stacks["model-bucket"]["BucketName"]
    assert configuration["Environment"]["Variables"] == {
        "MODEL_S3_URI": f"s3://{bucket}/{KEY}",
        "INVOKE_MODE": "BUFFERED",
        "LOG_LEVEL": "INFO",
        "SERVE_PAGE": "false",
        "CORS_ALLOW_ORIGINS": "",
        "API_KEY_ARN": "",
        "PROMPT_CACHE_S3_URI": "",
        "BATCH_RESULTS_S3_URI": f"s3://{stacks['batch']['BucketName']}/results",
    }
    iam: Any = boto3.client("iam")
    role = configuration["Role"].rsplit("/", 1)[1]
    document = iam.get_role_policy(RoleName=role, PolicyName="function")["PolicyDocument"]
    assert f"'s3:GetObject', 'Resource': 'arn:aws:s3:::{bucket}/{KEY}'" in str(document)
    assert f"'s3:ListBucket', 'Resource': 'arn:aws:s3:::{stacks['batch']['BucketName']}'" in str(document)
    for action in ("kms:", "xray:", "ssm:", "secretsmanager:", "sqs:ReceiveMessage"):
        assert action not in str(document)  # unless a parameter asks for it


def test_logs_and_dashboard(stacks: dict[str, dict[str, str]]) -> None:
    logs: Any = boto3.client("logs")
    (group,) = logs.describe_log_groups(logGroupNamePrefix="/aws/lambda/bitnet-function")["logGroups"]
    assert group["retentionInDays"] == 30
    assert stacks["function"]["LogGroup"] == group["logGroupName"]
    cloudwatch: Any = boto3.client("cloudwatch")
    body = json.loads(cloudwatch.get_dashboard(DashboardName="bitnet-function")["DashboardBody"])
    assert len(body["widgets"]) == 9
    assert stacks["function"]["FunctionName"] in json.dumps(body)


def test_the_deploy_role(stacks: dict[str, dict[str, str]]) -> None:
    iam: Any = boto3.client("iam")
    name = stacks["deploy-role"]["RoleArn"].rsplit("/", 1)[1]
    document = iam.get_role_policy(RoleName=name, PolicyName="deploy")["PolicyDocument"]
    assert "cloudformation:ExecuteChangeSet" in str(document)
    assert "s3:PutObject" not in str(document)  # unless there is an ArtifactBucketArn
    (trust,) = iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Condition"]["StringEquals"]["token.actions.githubusercontent.com:sub"] == (
        "repo:owner/name:environment:production"
    )

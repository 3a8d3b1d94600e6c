"""What the linters do not know: limits, who may do what, and that the template and the function agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from function.settings import Settings
from tests.e2e.emulator import Emulator
from tests.infra.templates import Template, as_list, filled, names, only, statements, template

FUNCTION = template("function")
PARAMETERS = FUNCTION["Parameters"]
# Limits of Lambda: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
LIMITS = {"MemorySize": (128, 10240), "EphemeralStorage": (512, 10240), "Timeout": (1, 900)}


@pytest.mark.parametrize("name", LIMITS)
def test_parameters_stay_within_lambda_s_limits(name: str) -> None:
    parameter = PARAMETERS[name]
    least, most = LIMITS[name]
    assert least <= parameter["MinValue"] <= parameter["Default"] <= parameter["MaxValue"] <= most
    properties = only(FUNCTION, "AWS::Lambda::Function")
    used = properties["EphemeralStorage"]["Size"] if name == "EphemeralStorage" else properties[name]
    assert used == {"Ref": name}


def variables(**parameters: str) -> dict[str, str]:
    """The function's environment if the stack has these parameters and its defaults."""
    values = {name: str(parameter.get("Default", "")) for name, parameter in PARAMETERS.items()} | parameters
    environment = only(FUNCTION, "AWS::Lambda::Function")["Environment"]["Variables"]
    return {
        name: values[value["Ref"]] if "Ref" in value else filled(value["Fn::Sub"], values)
        for name, value in environment.items()
    }


@pytest.mark.parametrize("invoke_mode", PARAMETERS["InvokeMode"]["AllowedValues"])
@pytest.mark.parametrize("log_level", PARAMETERS["LogLevel"]["AllowedValues"])
def test_the_function_understands_its_environment(invoke_mode: str, log_level: str) -> None:
    environment = variables(ModelBucket="models", ModelKey="a/b.gguf", InvokeMode=invoke_mode, LogLevel=log_level)
    assert {name.lower() for name in environment} <= Settings.__dataclass_fields__.keys()
    settings = Settings.from_environment(environment)
    assert settings.model_s3_uri == "s3://models/a/b.gguf"
    assert settings.log_level == log_level
    assert settings.invoke_mode == invoke_mode


def test_the_url_and_the_function_agree_on_the_invoke_mode() -> None:
    url = only(FUNCTION, "AWS::Lambda::Url")
    environment = only(FUNCTION, "AWS::Lambda::Function")["Environment"]["Variables"]
    assert url["InvokeMode"] == environment["INVOKE_MODE"] == {"Ref": "InvokeMode"}
    assert set(PARAMETERS["InvokeMode"]["AllowedValues"]) == {"BUFFERED", "RESPONSE_STREAM"}


def test_the_url_asks_for_a_signature() -> None:
    assert only(FUNCTION, "AWS::Lambda::Url")["AuthType"] == "AWS_IAM"
    kinds = {resource["Type"] for resource in FUNCTION["Resources"].values()}
    assert "AWS::Lambda::Permission" not in kinds  # so nobody may by the function's own policy


def test_callers_get_both_permissions_for_this_function_only() -> None:
    policy = only(FUNCTION, "AWS::IAM::ManagedPolicy")["PolicyDocument"]
    assert [statement["Action"] for statement in policy["Statement"]] == [
        "lambda:InvokeFunctionUrl",
        "lambda:InvokeFunction",
    ]
    for statement in policy["Statement"]:
        assert statement["Resource"] == [{"Fn::GetAtt": ["Function", "Arn"]}, {"Fn::Sub": "${Function.Arn}:live"}]


def test_the_function_may_do_what_it_does_and_no_more() -> None:
    role = only(FUNCTION, "AWS::IAM::Role")
    assert "ManagedPolicyArns" not in role
    (policy,) = role["Policies"]
    model = "arn:${AWS::Partition}:s3:::${ModelBucket}/${ModelKey}"
    granted = {
        (statement.get("If"), *sorted(as_list(statement["Action"]))): statement["Resource"]
        for statement in statements(policy["PolicyDocument"])
    }
    assert granted == {
        (None, "s3:GetObject"): {"Fn::Sub": model},
        (None, "logs:CreateLogStream", "logs:PutLogEvents"): {"Fn::GetAtt": ["LogGroup", "Arn"]},
        (None, "sqs:SendMessage"): {"Fn::GetAtt": ["FailureQueue", "Arn"]},
        ("HasModelKmsKey", "kms:Decrypt"): {"Ref": "ModelKmsKeyArn"},
        ("HasTracing", "xray:PutTelemetryRecords", "xray:PutTraceSegments"): "*",
    }


@pytest.mark.parametrize("key", ["*", "models/*", "model?.gguf", "${aws:username}", ""])
def test_a_model_key_is_one_key(key: str) -> None:
    assert not re.fullmatch(PARAMETERS["ModelKey"]["AllowedPattern"], key)
    assert re.fullmatch(PARAMETERS["ModelKey"]["AllowedPattern"], "bitnet/2B-4T/model_v1.gguf")


@pytest.mark.parametrize("name", names())
def test_no_statement_allows_every_action(name: str) -> None:
    def look(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("Effect") == "Allow":
                assert not [action for action in as_list(value["Action"]) if "*" in action]
                assert "NotAction" not in value
            for part in value.values():
                look(part)
        elif isinstance(value, list):
            for part in value:
                look(part)

    look(template(name))


def test_optional_parts_follow_their_parameters() -> None:
    alias = only(FUNCTION, "AWS::Lambda::Alias")
    condition, given, otherwise = alias["ProvisionedConcurrencyConfig"]["Fn::If"]
    assert (condition, otherwise) == ("HasProvisionedConcurrency", {"Ref": "AWS::NoValue"})
    assert given == {"ProvisionedConcurrentExecutions": {"Ref": "ProvisionedConcurrency"}}
    assert PARAMETERS["ProvisionedConcurrency"]["Default"] == 0
    assert only(FUNCTION, "AWS::Lambda::Function")["TracingConfig"] == {"Mode": {"Ref": "Tracing"}}
    (name,) = [name for name, resource in FUNCTION["Resources"].items() if resource["Type"] == "AWS::Lambda::Alias"]
    assert only(FUNCTION, "AWS::Lambda::Url")["TargetFunctionArn"] == {"Ref": name}


def alarms() -> dict[str, Template]:
    return {
        name: resource["Properties"]
        for name, resource in FUNCTION["Resources"].items()
        if resource["Type"] == "AWS::CloudWatch::Alarm"
    }


def test_alarms_tell_the_topic() -> None:
    assert alarms().keys() == {"ErrorAlarm", "ThrottleAlarm", "ServerErrorAlarm", "DurationAlarm", "FailureAlarm"}
    for alarm in alarms().values():
        assert alarm["AlarmActions"] == {
            "Fn::If": ["HasAlarmTopic", [{"Ref": "AlarmTopicArn"}], {"Ref": "AWS::NoValue"}]
        }
        assert alarm["TreatMissingData"] == "notBreaching"


def test_the_dashboard_reads_what_the_function_logs(demo_model: Path) -> None:
    """The fields of its log queries are those of real log lines."""
    body = only(FUNCTION, "AWS::CloudWatch::Dashboard")["DashboardBody"]["Fn::Sub"]
    values = {"AWS::Region": "eu-west-1", "Function": "f", "LogGroup": "/aws/lambda/f", "Timeout": "300"}
    queries = [
        widget["properties"]["query"]
        for widget in json.loads(filled(body, values))["widgets"]
        if widget["type"] == "log" and "'request'" in widget["properties"]["query"]
    ]
    assert queries
    with Emulator({"MODEL_PATH": str(demo_model)}) as function:
        function.invoke({"prompt": "Once", "n_predict": 3})
        function.invoke({"prompt": "Once", "n_predict": -7})
        logged = [json.loads(line) for line in function.log().splitlines() if '"message":"request"' in line]
    fields = {name for line in logged for name in line}
    assert {"tokens_predicted", "predicted_ms", "status", "stop_type", "error_code"} <= fields
    for query in queries:
        words = set(re.findall(r"\b[a-z]+_[a-z_]+\b", query.split("|", 1)[1]))
        assert words
        assert words <= fields


def test_the_registry() -> None:
    repository = only(template("registry"), "AWS::ECR::Repository")
    assert repository["ImageTagMutability"] == "IMMUTABLE"
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
    policy = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])
    assert [rule["action"] for rule in policy["rules"]] == [{"type": "expire"}] * 2


def test_the_bucket() -> None:
    plain = template("model-bucket")
    bucket = plain["Resources"]["Bucket"]
    rules = bucket["Properties"]["LifecycleConfiguration"]["Rules"]
    assert [rule["AbortIncompleteMultipartUpload"] for rule in rules if "AbortIncompleteMultipartUpload" in rule]
    assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["Properties"]["VersioningConfiguration"] == {"Status": "Enabled"}
    assert {s["Effect"] for s in only(plain, "AWS::S3::BucketPolicy")["PolicyDocument"]["Statement"]} == {"Deny"}


def test_the_deploy_role_trusts_one_subject() -> None:
    plain = template("deploy-role")
    (trust,) = only(plain, "AWS::IAM::Role")["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Condition"] == {
        "StringEquals": {
            "token.actions.githubusercontent.com:aud": "sts.amazonaws.com",
            "token.actions.githubusercontent.com:sub": {"Fn::Sub": "repo:${Repository}:${Subject}"},
        }
    }
    pattern = plain["Parameters"]["Subject"]["AllowedPattern"]
    for subject in ("*", "ref:*", "ref:refs/heads/*", "environment:*", "pull_request", "environment:a:ref:b"):
        assert not re.fullmatch(pattern, subject), subject
    for subject in ("environment:production", "ref:refs/heads/main", "ref:refs/tags/v1.0"):
        assert re.fullmatch(pattern, subject), subject
    assert not re.fullmatch(plain["Parameters"]["Repository"]["AllowedPattern"], "owner/*")


def test_the_deploy_role_cannot_exceed_the_boundary() -> None:
    plain = template("deploy-role")
    granted = statements(only(plain, "AWS::IAM::Role")["Policies"][0]["PolicyDocument"])
    for statement in granted:
        if statement["Effect"] == "Allow":
            for action in as_list(statement["Action"]):
                if action in ("iam:CreateRole", "iam:PutRolePolicy", "iam:AttachRolePolicy", "iam:DeleteRolePolicy"):
                    assert statement["Condition"] == {"StringEquals": {"iam:PermissionsBoundary": {"Ref": "Boundary"}}}
                assert action not in ("iam:DeleteRolePermissionsBoundary", "iam:PutRolePermissionsBoundary")
                assert action != "iam:UpdateAssumeRolePolicy"
    (denied,) = [statement for statement in granted if statement["Effect"] == "Deny"]
    assert denied["Action"] == "iam:*"  # on itself and its boundary


def test_the_boundary_leaves_the_function_what_it_needs() -> None:
    """Whatever the function's role is granted, the boundary grants too."""
    role = only(FUNCTION, "AWS::IAM::Role")["Policies"][0]["PolicyDocument"]
    boundary = only(template("deploy-role"), "AWS::IAM::ManagedPolicy")["PolicyDocument"]
    needed, left = (
        {action for statement in statements(policy) for action in as_list(statement["Action"])}
        for policy in (role, boundary)
    )
    assert needed == left

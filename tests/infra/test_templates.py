"""What the linters do not know: limits, who may do what, and that the template and the function agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from function.metrics import NAMESPACE
from function.settings import Settings, SettingsError
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


def resolved(value: Any, values: dict[str, str]) -> Any:
    """What CloudFormation makes of a value or a condition, given the parameters."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((function, argument),) = value.items()
    match function:
        case "Ref":
            return values[argument]
        case "Condition":
            return resolved(FUNCTION["Conditions"][argument], values)
        case "Fn::Sub":
            return filled(argument, values)
        case "Fn::If":
            condition, given, otherwise = argument
            return resolved(given if resolved({"Condition": condition}, values) else otherwise, values)
        case "Fn::Not":
            return not resolved(argument[0], values)
        case "Fn::Equals":
            first, second = (str(resolved(part, values)) for part in argument)
            return first == second
    return value


def given(**parameters: str) -> dict[str, str]:
    """The parameters of a stack: these, and the defaults of the others."""
    assert parameters.keys() <= PARAMETERS.keys()
    return {name: str(parameter.get("Default", "")) for name, parameter in PARAMETERS.items()} | parameters


def variables(**parameters: str) -> dict[str, str]:
    """The function's environment if the stack has these parameters and its defaults."""
    environment = only(FUNCTION, "AWS::Lambda::Function")["Environment"]["Variables"]
    return {name: resolved(value, given(**parameters)) for name, value in environment.items()}


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


def test_optional_settings_are_set_by_their_parameters() -> None:
    plain = Settings.from_environment(variables(ModelBucket="models", ModelKey="m"))
    assert (plain.api_key_arn, plain.prompt_cache_s3_uri, plain.batch_results_s3_uri) == (None, None, None)
    arn = "arn:aws:ssm:eu-west-1:123456789012:parameter/bitnet/key"
    optional = {"ApiKeyArn": arn, "PromptCacheBucket": "cache", "BatchBucket": "batches"}
    settings = Settings.from_environment(variables(ModelBucket="models", ModelKey="m", **optional))
    assert settings.api_key_arn == arn
    assert settings.prompt_cache_s3_uri == "s3://cache/prompts"
    assert settings.batch_results_s3_uri == "s3://batches/results"


@pytest.mark.parametrize(
    "origins",
    ["", "*", "https://example.org", "http://localhost:3000,https://example.org", "example.org", "https://a.b/", "*,*"],
)
def test_origins_are_what_the_function_takes_for_them(origins: str) -> None:
    environment = variables(ModelBucket="models", ModelKey="m", CorsAllowOrigins=origins)
    if re.fullmatch(PARAMETERS["CorsAllowOrigins"]["AllowedPattern"], origins):
        assert Settings.from_environment(environment).cors_allow_origins == origins
    else:
        with pytest.raises(SettingsError, match="CORS_ALLOW_ORIGINS"):
            Settings.from_environment(environment)


def test_the_function_keeps_prompts_where_its_role_may() -> None:
    pattern = re.compile(PARAMETERS["PromptCachePrefix"]["AllowedPattern"])
    assert [bool(pattern.fullmatch(prefix)) for prefix in ("a", "a/b", "a/", "/", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_url_asks_for_a_signature_unless_told_otherwise() -> None:
    assert only(FUNCTION, "AWS::Lambda::Url")["AuthType"] == {"Ref": "AuthType"}
    assert PARAMETERS["AuthType"]["Default"] == "AWS_IAM"
    permissions = [r for r in FUNCTION["Resources"].values() if r["Type"] == "AWS::Lambda::Permission"]
    assert {permission["Condition"] for permission in permissions} == {"IsOpen"}
    assert not resolved({"Condition": "IsOpen"}, given())
    # https://docs.aws.amazon.com/lambda/latest/dg/urls-auth.html: both, and the second through the URL only
    first, second = (permission["Properties"] for permission in permissions)
    assert first == {
        "Action": "lambda:InvokeFunctionUrl",
        "FunctionName": {"Ref": "FunctionAliaslive"},
        "Principal": "*",
        "FunctionUrlAuthType": "NONE",
    }
    assert second == {
        "Action": "lambda:InvokeFunction",
        "FunctionName": {"Ref": "FunctionAliaslive"},
        "Principal": "*",
        "InvokedViaFunctionUrl": True,
    }


@pytest.mark.parametrize(
    ("parameters", "broken"),
    [
        ({}, []),
        ({"ReservedConcurrency": "-1"}, []),
        ({"AuthType": "NONE"}, ["it needs ApiKeyArn"]),
        ({"AuthType": "NONE", "ApiKeyArn": "arn"}, []),
        ({"AuthType": "NONE", "ApiKeyArn": "arn", "ReservedConcurrency": "-1"}, ["it needs ReservedConcurrency"]),
        ({"AuthType": "NONE", "ReservedConcurrency": "-1"}, ["it needs ApiKeyArn", "it needs ReservedConcurrency"]),
        ({"ApiKeyArn": "arn"}, ["it needs AuthType NONE"]),
        ({"BatchQueueArn": "arn"}, ["need BatchBucket"]),
        ({"BatchQueueArn": "arn", "BatchBucket": "b"}, []),
    ],
)
def test_what_does_not_go_together_is_refused(parameters: dict[str, str], broken: list[str]) -> None:
    values = given(**parameters)
    said = [
        assertion["AssertDescription"]
        for rule in FUNCTION["Rules"].values()
        if resolved(rule["RuleCondition"], values)
        for assertion in rule["Assertions"]
        if not resolved(assertion["Assert"], values)
    ]
    assert len(said) == len(broken)
    assert all(part in whole for part, whole in zip(broken, said, strict=True))


def test_the_queue_s_messages_are_answered_one_by_one() -> None:
    mapping = only(FUNCTION, "AWS::Lambda::EventSourceMapping")
    assert mapping["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert mapping["EventSourceArn"] == {"Ref": "BatchQueueArn"}


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
        ("HasApiKey", "secretsmanager:GetSecretValue", "ssm:GetParameter"): {"Ref": "ApiKeyArn"},
        ("HasApiKeyKmsKey", "kms:Decrypt"): {"Ref": "ApiKeyKmsKeyArn"},
        ("HasPromptCache", "s3:GetObject", "s3:PutObject"): {
            "Fn::Sub": "arn:${AWS::Partition}:s3:::${PromptCacheBucket}/${PromptCachePrefix}/*"
        },
        ("HasBatch", "s3:GetObject", "s3:PutObject"): {
            "Fn::Sub": "arn:${AWS::Partition}:s3:::${BatchBucket}/results/*"
        },
        ("HasBatch", "s3:ListBucket"): {"Fn::Sub": "arn:${AWS::Partition}:s3:::${BatchBucket}"},
        ("HasBatchQueue", "sqs:DeleteMessage", "sqs:GetQueueAttributes", "sqs:ReceiveMessage"): {
            "Ref": "BatchQueueArn"
        },
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
    names = {"Error", "Throttle", "ServerError", "Duration", "Failure", "ColdStart", "TokensPerSecond"}
    assert alarms().keys() == {f"{name}Alarm" for name in names}
    for alarm in alarms().values():
        assert alarm["AlarmActions"] == {
            "Fn::If": ["HasAlarmTopic", [{"Ref": "AlarmTopicArn"}], {"Ref": "AWS::NoValue"}]
        }
        assert alarm["TreatMissingData"] == "notBreaching"


def test_what_is_watched_is_what_the_function_writes(demo_model: Path) -> None:
    """The metrics of alarms and dashboard, and the fields of its log queries, are those of real log lines."""
    body = only(FUNCTION, "AWS::CloudWatch::Dashboard")["DashboardBody"]["Fn::Sub"]
    values = {"AWS::Region": "eu-west-1", "Function": "f", "LogGroup": "/aws/lambda/f", "Timeout": "300"}
    properties = [widget["properties"] for widget in json.loads(filled(body, values))["widgets"]]
    with Emulator({"MODEL_PATH": str(demo_model), "AWS_LAMBDA_FUNCTION_NAME": "f"}) as function:
        for request in ({"n_predict": 3}, {"n_predict": -7}, {"stop": [" a"]}, {"n_predict": -1}):
            function.invoke({"prompt": "Once upon a time", "temperature": 0} | request)
        lines = [json.loads(line) for line in function.log().splitlines() if line.startswith("{")]
    written = {
        metric["Name"] for line in lines if "_aws" in line for metric in line["_aws"]["CloudWatchMetrics"][0]["Metrics"]
    }
    fields = {name for line in lines if line.get("message") == "request" for name in line}
    # What need not happen here: test_metrics.py has the copy, the restart and the errors.
    known = written | {"ModelCopyTime", "ModelCopyBytes", "EngineRestarts", "ServerErrors"}
    known |= {f"Stop{reason}" for reason in ("Eos", "Limit", "Word", "Deadline", "Cancelled")}
    shown = {row[1] for part in properties for row in part.get("metrics", []) if row[0] == NAMESPACE}
    assert {"TokensPerSecond", "TimeToFirstToken", "ColdStartTime", "StopWord"} <= shown & written
    assert shown <= known
    watched = {alarm["MetricName"] for alarm in alarms().values() if alarm.get("Namespace") == NAMESPACE}
    assert watched == {"ColdStartTime", "TokensPerSecond"}
    queries = [part["query"] for part in properties if "query" in part]
    assert queries
    for query in queries:
        words = set(re.findall(r"\b(?:[a-z]+_[a-z_]+|route|status)\b", query.split("|", 1)[1]))
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

"""Rules of the buckets' own, where the server has such: what our sweepers overlook ends all the same, days later."""

from __future__ import annotations

import math
from collections.abc import Sequence

from minio import commonconfig, lifecycleconfig

from kit import telemetry
from services.storage import assets, config, parts

log = telemetry.logger(__name__)

_OURS = "framewire-"
_DAY_SECONDS = 86_400
_NO_RULES: Sequence[lifecycleconfig.Rule] = ()


def rules(bucket: assets.Bucket, settings: config.Settings) -> list[lifecycleconfig.Rule]:
    """What a bucket should do by itself, at least a whole day after a sweeper should have."""
    unfinished = lifecycleconfig.Rule(
        commonconfig.ENABLED,
        commonconfig.Filter(prefix=""),
        f"{_OURS}unfinished",
        abort_incomplete_multipart_upload=lifecycleconfig.AbortIncompleteMultipartUpload(
            _days(settings.put_leftover_seconds * 2)
        ),
    )
    if bucket is assets.Bucket.OUTPUT:
        return [unfinished]
    incoming = lifecycleconfig.Rule(
        commonconfig.ENABLED,
        commonconfig.Filter(prefix=assets.INCOMING),
        f"{_OURS}incoming",
        expiration=lifecycleconfig.Expiration(days=_days(settings.upload_keep_seconds)),
    )
    return [incoming, unfinished]


def ensure(client: parts.Client, name: str, wanted: Sequence[lifecycleconfig.Rule]) -> list[str]:
    """Gives a bucket these rules, each by itself; answers those that it took. The operator's own rules stay.

    rclone takes none. MinIO takes no rule about unfinished uploads: it drops them after a day by itself.
    """
    taken: list[str] = []
    for rule in wanted:
        try:
            found = client.get_bucket_lifecycle(name)
            there = found.rules if found is not None else _NO_RULES
            if not any(_same(each, rule) for each in there):
                others = [each for each in there if each.rule_id != rule.rule_id]
                client.set_bucket_lifecycle(name, lifecycleconfig.LifecycleConfig([*others, rule]))
        except parts.REFUSED as error:
            log.info("bucket_rule_refused", bucket=name, rule=rule.rule_id, error=repr(error)[:300])
        else:
            taken.append(str(rule.rule_id))
    return taken


def _same(one: lifecycleconfig.Rule, other: lifecycleconfig.Rule) -> bool:
    return (one.rule_id, one.status, _counted(one)) == (
        other.rule_id,
        other.status,
        _counted(other),
    )


def _counted(rule: lifecycleconfig.Rule) -> tuple[int | None, int | None]:
    expiration, parts_ = rule.expiration, rule.abort_incomplete_multipart_upload
    return (
        expiration.days if expiration else None,
        parts_.days_after_initiation if parts_ else None,
    )


def _days(seconds: float) -> int:
    return math.ceil(seconds / _DAY_SECONDS) + 1

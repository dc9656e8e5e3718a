//! The Prometheus endpoint.

use super::AgentError;
use super::shared::Shared;
use super::status::{Sizes, Status};
use crate::bpf::fill::RingFill;
use crate::bpf::programs::ProgramStats;
use crate::handover::report::{ApplicationStatus, Status as UpdateStatus, UpdateReport};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tiny_http::{Header, Response, Server};

type Size = fn(&Sizes) -> u64;
type Labels = Vec<(&'static str, String)>;

pub(super) fn listen(address: SocketAddr) -> Result<Server, AgentError> {
    Server::http(address).map_err(|source| AgentError::Metrics { address, source })
}

pub(super) fn serve(server: &Server, shared: &Shared) {
    for request in server.incoming_requests() {
        let response = match (request.url(), shared.status()) {
            ("/metrics", Ok(status)) => Response::from_string(render(&status)),
            ("/metrics", Err(gone)) => {
                Response::from_string(gone.to_string()).with_status_code(503)
            }
            _ => Response::from_string("Metrics are at /metrics\n").with_status_code(404),
        };
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        let kind = Header::from_bytes("Content-Type", kind);
        let response = kind.into_iter().fold(response, Response::with_header);
        if let Err(error) = request.respond(response) {
            tracing::debug!(%error, "a scraper went away");
        }
    }
}

/// The status in the text format.
fn render(status: &Status) -> String {
    let mut registry = Registry::with_prefix("tracker");
    let counters = &status.counters;
    counter(
        &mut registry,
        "events",
        "Events applied to the model",
        counters.events,
    );
    counter(
        &mut registry,
        "malformed_events",
        "Events not decoded",
        counters.malformed,
    );
    counter(
        &mut registry,
        "missing_events",
        "Event numbers never seen",
        counters.gaps,
    );
    counter(
        &mut registry,
        "readings",
        "Readings of suspect objects",
        counters.readings,
    );
    let failed = counters.failed_readings;
    counter(
        &mut registry,
        "failed_readings",
        "Readings that failed",
        failed,
    );
    by(
        &mut registry,
        "lost_events",
        "Events lost by class",
        "class",
        &counters.lost,
    );
    let anomalies = &counters.anomalies;
    by(
        &mut registry,
        "anomalies",
        "Events the model could not explain",
        "kind",
        anomalies,
    );
    by(
        &mut registry,
        "resyncs",
        "Objects read again because they were suspect",
        "kind",
        &counters.resyncs,
    );
    single(
        &mut registry,
        "lag_events",
        "Events not applied yet",
        status.lag,
    );
    let suspects = status
        .suspects
        .iter()
        .map(|(kind, n)| (vec![("kind", kind.clone())], *n));
    gauge(
        &mut registry,
        "suspects",
        "Objects to be read again",
        suspects,
    );
    gauge(
        &mut registry,
        "adopted_sockets",
        "Sockets made outside the applications that are followed",
        [(Vec::new(), counters.adopted)],
    );
    let applications = || status.applications.iter();
    let sizes: [(&str, &str, Size); 5] = [
        ("processes", "Processes", |sizes| sizes.processes),
        ("threads", "Threads", |sizes| sizes.threads),
        ("descriptors", "File descriptors", |sizes| sizes.descriptors),
        ("epoll_items", "Epoll items", |sizes| sizes.epoll_items),
        ("mappings", "Memory mappings", |sizes| sizes.mappings),
    ];
    for (name, help, size) in sizes {
        let values =
            applications().map(|a| (vec![("application", a.name.clone())], size(&a.sizes)));
        gauge(&mut registry, name, help, values);
    }
    let kinds = applications().flat_map(|app| {
        app.sizes.kinds.iter().map(|(kind, count)| {
            (
                vec![("application", app.name.clone()), ("kind", kind.clone())],
                *count,
            )
        })
    });
    gauge(&mut registry, "open_files", "Open file descriptions", kinds);
    agent(&mut registry, status);
    programs(&mut registry, &status.programs);
    if let Some(report) = &status.last_update {
        last_update(&mut registry, report);
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, &registry);
    text
}

/// The agent's process, its rings and the last audit.
fn agent(registry: &mut Registry, status: &Status) {
    let cpu = Counter::<f64, AtomicU64>::default();
    cpu.inc_by(status.agent.cpu_seconds);
    registry.register("agent_cpu_seconds", "CPU time of the agent", cpu);
    let resident = status.agent.resident_bytes;
    single(
        registry,
        "agent_resident_bytes",
        "Memory the agent has in use",
        resident,
    );
    let help = "When the agent started, in seconds since the epoch";
    float(
        registry,
        "agent_start_time_seconds",
        help,
        status.agent.start_time,
    );
    let lent = Counter::<u64, AtomicU64>::default();
    lent.inc_by(status.spare_iterators.lent);
    let help = "Commands that got the spare iterators";
    registry.register("iterators_lent", help, lent);
    let rings = |value: fn(&RingFill) -> u64| {
        let rings = status.rings.iter().enumerate();
        let rings = rings.map(|(shard, ring)| (vec![("shard", shard.to_string())], value(ring)));
        rings.collect::<Vec<_>>()
    };
    let help = "Bytes of events in a ring that are not consumed yet";
    gauge(registry, "ring_fill_bytes", help, rings(|ring| ring.bytes));
    let help = "Bytes a ring has room for";
    gauge(registry, "ring_size_bytes", help, rings(|ring| ring.size));
    // Nothing, rather than no differences, before the first audit.
    if let Some(audit) = status.last_audit {
        let help = "Objects that the model and the kernel described differently in the last audit";
        single(registry, "audit_differences", help, audit.differences);
        let help = "When the last audit ended, in seconds since the epoch";
        float(registry, "audit_time_seconds", help, audit.time);
    }
}

/// What the kernel counts of the hooks' programs.
fn programs(registry: &mut Registry, programs: &[ProgramStats]) {
    let counts = |count: fn(&ProgramStats) -> u64| {
        let counts = programs.iter().map(|one| (one.name.clone(), count(one)));
        counts.collect::<BTreeMap<_, _>>()
    };
    by(
        registry,
        "program_runs",
        "Runs of the BPF programs, while kernel.bpf_stats_enabled is set",
        "program",
        &counts(|one| one.run_cnt),
    );
    by(
        registry,
        "program_recursion_misses",
        "Runs of the BPF programs that the kernel left out",
        "program",
        &counts(|one| one.recursion_misses),
    );
}

/// What the update that started this kernel cost, and what became of the applications.
fn last_update(registry: &mut Registry, report: &UpdateReport) {
    let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
    for (phase, nanoseconds) in [
        ("until_kexec", report.frozen_until_kexec),
        ("boot", report.boot),
        ("restore", report.restore),
        ("total", report.total),
    ] {
        let seconds = Duration::from_nanos(nanoseconds).as_secs_f64();
        let label = vec![("phase", phase.to_owned())];
        family.get_or_create(&label).set(seconds);
    }
    registry.register(
        "update_frozen_seconds",
        "How long the applications stood still for the last update",
        family,
    );
    let outcomes = [
        ("restored", ApplicationStatus::Restored),
        ("restarted", ApplicationStatus::Restarted),
        ("failed", ApplicationStatus::Failed),
    ];
    let counts = outcomes.map(|(name, status)| {
        let with = report
            .applications
            .iter()
            .filter(|app| app.status == status);
        (vec![("outcome", name.to_owned())], with.count() as u64)
    });
    gauge(
        registry,
        "update_applications",
        "Applications of the last update by what became of them",
        counts,
    );
    let done = u64::from(report.status == UpdateStatus::Done);
    let help = "Whether the last update restored everything";
    single(registry, "update_done", help, done);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let metric = Counter::<u64>::default();
    metric.inc_by(value);
    registry.register(name, help, metric);
}

fn single(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let metric = Gauge::<i64>::default();
    metric.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, metric);
}

fn float(registry: &mut Registry, name: &str, help: &str, value: f64) {
    let metric = Gauge::<f64, AtomicU64>::default();
    metric.set(value);
    registry.register(name, help, metric);
}

fn by(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: &BTreeMap<String, u64>,
) {
    let family = Family::<Labels, Counter>::default();
    for (value, count) in values {
        family
            .get_or_create(&vec![(label, value.clone())])
            .inc_by(*count);
    }
    registry.register(name, help, family);
}

fn gauge(
    registry: &mut Registry,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (Labels, u64)>,
) {
    let family = Family::<Labels, Gauge>::default();
    for (labels, value) in values {
        family
            .get_or_create(&labels)
            .set(i64::try_from(value).unwrap_or(i64::MAX));
    }
    registry.register(name, help, family);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::status::LastAudit;
    use crate::bpf::track::HookSet;
    use crate::model::state::State;
    use crate::track::{Counters, View};

    #[test]
    fn programs_are_told_apart_by_name() {
        let program = |name: &str, run_cnt, recursion_misses| ProgramStats {
            name: name.to_owned(),
            run_cnt,
            recursion_misses,
            ..ProgramStats::default()
        };
        let mut registry = Registry::with_prefix("tracker");
        programs(
            &mut registry,
            &[program("fd_install", 7, 0), program("dup_fd", 3, 2)],
        );
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            r#"tracker_program_runs_total{program="fd_install"} 7"#,
            r#"tracker_program_runs_total{program="dup_fd"} 3"#,
            r#"tracker_program_recursion_misses_total{program="fd_install"} 0"#,
            r#"tracker_program_recursion_misses_total{program="dup_fd"} 2"#,
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }

    #[test]
    fn an_audit_is_shown_only_once_there_was_one() {
        let view = View {
            state: &State::default(),
            counters: &Counters::default(),
            hooks: HookSet::Fallback,
            refused: None,
            last_seq: 0,
        };
        let mut status = Status::of(view, &BTreeMap::new());
        status.rings = vec![RingFill {
            bytes: 64,
            size: 4096,
        }];
        status.agent.cpu_seconds = 2.5;
        let text = render(&status);
        for line in [
            r#"tracker_ring_fill_bytes{shard="0"} 64"#,
            r#"tracker_ring_size_bytes{shard="0"} 4096"#,
            "tracker_agent_cpu_seconds_total 2.5",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
        assert!(!text.contains("audit"), "{text}");
        status.last_audit = Some(LastAudit {
            time: 1.5,
            differences: 3,
            unstable: 0,
            descriptors: 9,
        });
        assert!(render(&status).contains("\ntracker_audit_differences 3\n"));
    }
}

//! The Prometheus endpoint.

use super::AgentError;
use super::status::{Sizes, Status};
use crate::handover::report::{ApplicationStatus, Status as UpdateStatus, UpdateReport};
use crate::track::{Settle, Tracking};
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

pub(super) fn serve(server: &Server, tracking: &Tracking) {
    for request in server.incoming_requests() {
        let response = match (request.url(), tracking.view(Settle::No)) {
            ("/metrics", Ok(view)) => {
                Response::from_string(render(&Status::now(&view, &tracking.roots)))
            }
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
    if let Some(report) = &status.last_update {
        last_update(&mut registry, report);
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, &registry);
    text
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

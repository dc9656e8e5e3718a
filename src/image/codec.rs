//! Image <-> metadata bytes. The decoder takes every input as hostile.

use super::header::Header;
use super::record::{Frame, RecordKind, frame, push};
use super::{Image, ImageError};
use crate::model::frozen::{Application, ApplicationHeader, Process, Thread};
use crc32fast::hash;
use std::collections::BTreeMap;

/// Encodes an image, sealed.
#[must_use]
pub fn encode(image: &Image) -> Vec<u8> {
    let mut out = Header::current().to_bytes().to_vec();
    let mut records = 0_u64;
    let mut add = |out: &mut Vec<u8>, kind, value: &dyn erased::Value| {
        value.push(out, kind);
        records += 1;
    };
    if let Some(system) = &image.system {
        add(&mut out, RecordKind::System, system);
    }
    for application in &image.applications {
        add(&mut out, RecordKind::Application, &application.header);
        for process in &application.processes {
            let bare = Process {
                threads: Vec::new(),
                ..process.clone()
            };
            add(&mut out, RecordKind::Process, &bare);
            for thread in &process.threads {
                add(&mut out, RecordKind::Thread, thread);
            }
        }
        for entry in &application.mms {
            add(&mut out, RecordKind::Mm, &entry);
        }
        for entry in &application.files {
            add(&mut out, RecordKind::Files, &entry);
        }
        for entry in &application.ofds {
            add(&mut out, RecordKind::OpenFile, &entry);
        }
        for entry in &application.contents {
            add(&mut out, RecordKind::Content, &entry);
        }
    }
    let seal = (records, hash(&out));
    push(&mut out, RecordKind::Commit, &seal);
    out
}

mod erased {
    //! `Serialize` is not object safe; pushing a record is.
    use super::{RecordKind, push};

    pub(super) trait Value {
        fn push(&self, out: &mut Vec<u8>, kind: RecordKind);
    }

    impl<T: serde::Serialize> Value for T {
        fn push(&self, out: &mut Vec<u8>, kind: RecordKind) {
            push(out, kind, self);
        }
    }
}

/// Decodes sealed metadata.
///
/// # Errors
/// Anything but exactly what [`encode`] wrote: the record and offset are named.
pub fn decode(bytes: &[u8]) -> Result<Image, ImageError> {
    Header::parse(bytes)?;
    let mut image = Image::default();
    let mut offset = Header::LEN;
    let mut number = 1;
    loop {
        let record = frame(bytes, offset, number)?;
        if record.kind == RecordKind::Commit {
            check_seal(bytes, &record)?;
            return Ok(image);
        }
        add_record(&mut image, &record)?;
        offset = record.end();
        number += 1;
    }
}

fn check_seal(bytes: &[u8], record: &Frame<'_>) -> Result<(), ImageError> {
    let (records, crc): (u64, u32) = record.value()?;
    if records + 1 != record.number {
        return Err(record.invalid(format!("sealed with {records} records")));
    }
    if crc != hash(&bytes[..record.offset]) {
        return Err(record.invalid("the seal does not match the records before it".into()));
    }
    if record.end() != bytes.len() {
        return Err(record.invalid("bytes follow the seal".into()));
    }
    Ok(())
}

fn add_record(image: &mut Image, record: &Frame<'_>) -> Result<(), ImageError> {
    match record.kind {
        RecordKind::System => {
            if image.system.is_some() || !image.applications.is_empty() {
                return Err(record.invalid("System must come first and once".into()));
            }
            image.system = Some(record.value()?);
        }
        RecordKind::Application => {
            let header: ApplicationHeader = record.value()?;
            image.applications.push(Application {
                header,
                ..Application::default()
            });
        }
        _ => {
            let application = image
                .applications
                .last_mut()
                .ok_or_else(|| record.invalid("it belongs to no application".into()))?;
            add_to_application(application, record)?;
        }
    }
    Ok(())
}

fn add_to_application(app: &mut Application, record: &Frame<'_>) -> Result<(), ImageError> {
    match record.kind {
        RecordKind::Process => app.processes.push(record.value()?),
        RecordKind::Thread => {
            let thread: Thread = record.value()?;
            let process = app
                .processes
                .last_mut()
                .ok_or_else(|| record.invalid("a thread without a process".into()))?;
            process.threads.push(thread);
        }
        RecordKind::Mm => insert(&mut app.mms, record)?,
        RecordKind::Files => insert(&mut app.files, record)?,
        RecordKind::OpenFile => insert(&mut app.ofds, record)?,
        RecordKind::Content => insert(&mut app.contents, record)?,
        RecordKind::System | RecordKind::Application | RecordKind::Commit => {
            return Err(record.invalid(format!("{:?} within an application", record.kind)));
        }
    }
    Ok(())
}

fn insert<K, V>(map: &mut BTreeMap<K, V>, record: &Frame<'_>) -> Result<(), ImageError>
where
    K: Ord + serde::de::DeserializeOwned,
    V: serde::de::DeserializeOwned,
{
    let (key, value) = record.value()?;
    match map.insert(key, value) {
        None => Ok(()),
        Some(_) => Err(record.invalid(format!("a second {:?} of one identity", record.kind))),
    }
}

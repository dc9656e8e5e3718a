//! Metadata bytes -> image. Every input is hostile: nothing is taken that the encoder does not
//! write, and no more memory is used than a multiple of what is read.

use super::extents::Extents;
use super::header::Header;
use super::record::{Frame, RecordKind, frame};
use super::{Image, ImageError, SlotSums};
use crate::model::frozen::{Application, Content, FileKind, Mm, OpenFile, Process, Thread};
use crate::model::ids::{Pid, Tid};
use crc32fast::hash;
use serde::de::DeserializeOwned;
use serde_bytes::ByteBuf;
use std::collections::{BTreeMap, BTreeSet};

/// Decodes sealed metadata.
///
/// # Errors
/// Anything but exactly what [`super::encode`] wrote: the record and offset are named.
pub fn decode(bytes: &[u8]) -> Result<Image, ImageError> {
    read(bytes, Decoder::default())
}

/// Decodes of metadata that [`decode`] takes only what one application, counted from 0, needs.
/// Who restores one of many does not hold all of them.
///
/// # Errors
/// As [`decode`], but for what is wrong with the contents of other applications' records.
pub fn decode_one(bytes: &[u8], application: usize) -> Result<Image, ImageError> {
    let decoder = Decoder {
        only: Some(application),
        ..Decoder::default()
    };
    read(bytes, decoder)
}

fn read(bytes: &[u8], mut decoder: Decoder) -> Result<Image, ImageError> {
    Header::parse(bytes)?;
    let mut offset = Header::LEN;
    let mut number = 1;
    loop {
        let record = frame(bytes, offset, number)?;
        if !may_follow(record.kind, decoder.last) {
            return Err(record.invalid(match decoder.last {
                Some(last) => format!("{:?} after {last:?}", record.kind),
                None => format!("{:?} at the beginning", record.kind),
            }));
        }
        if record.kind == RecordKind::Commit {
            check_seal(bytes, &record)?;
            return Ok(decoder.image);
        }
        decoder.add(&record)?;
        decoder.last = Some(record.kind);
        offset = record.end();
        number += 1;
    }
}

/// The order of records. A process is followed by its threads, of which it has one at least.
fn may_follow(kind: RecordKind, last: Option<RecordKind>) -> bool {
    use RecordKind::{
        Application, Commit, Content, Files, Mm, OpenFile, Process, Slots, System, Thread,
    };
    let Some(last) = last else {
        return matches!(kind, System | Slots);
    };
    match kind {
        System => false,
        Slots => last == System,
        Process => matches!(last, Application | Thread),
        Thread => matches!(last, Process | Thread),
        Mm => matches!(last, Application | Thread | Mm),
        Files => matches!(last, Application | Thread | Mm | Files),
        OpenFile => matches!(last, Application | Thread | Mm | Files | OpenFile),
        Content => matches!(last, Application | Thread | Mm | Files | OpenFile | Content),
        Application | Commit => !matches!(last, System | Process),
    }
}

fn check_seal(bytes: &[u8], record: &Frame<'_>) -> Result<(), ImageError> {
    let (records, crc): (u64, u32) = record.value()?;
    if records.checked_add(1) != Some(record.number) {
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

/// What was read so far.
#[derive(Debug, Default)]
struct Decoder {
    image: Image,
    last: Option<RecordKind>,
    extents: Extents,
    /// The only application to decode.
    only: Option<usize>,
    /// How many have begun.
    begun: usize,
    names: BTreeSet<String>,
    /// Of the last application.
    pids: BTreeSet<Pid>,
    tids: BTreeSet<Tid>,
}

impl Decoder {
    /// The record is one that may come now.
    fn add(&mut self, record: &Frame<'_>) -> Result<(), ImageError> {
        if record.kind == RecordKind::Application {
            self.begun += 1;
        }
        let others = |only| self.begun > 0 && self.begun - 1 != only;
        if self.only.is_some_and(others) {
            return Ok(());
        }
        match record.kind {
            RecordKind::System => self.image.system = Some(record.value()?),
            RecordKind::Slots => {
                let sums: ByteBuf = record.value()?;
                let sums = SlotSums::from_bytes(&sums).ok_or_else(|| {
                    record.invalid(format!("{} bytes are no row of sums", sums.len()))
                })?;
                self.extents = Extents::of(sums.len());
                self.image.slots = sums;
            }
            RecordKind::Application => self.application(record)?,
            _ => {
                let application = self.image.applications.pop();
                let mut application = application
                    .ok_or_else(|| record.invalid("it belongs to no application".into()))?;
                self.object(&mut application, record)?;
                self.image.applications.push(application);
            }
        }
        Ok(())
    }

    fn application(&mut self, record: &Frame<'_>) -> Result<(), ImageError> {
        let application = Application {
            header: record.value()?,
            ..Application::default()
        };
        let name = &application.header.name;
        if !self.names.insert(name.clone()) {
            return Err(record.invalid(format!("a second application {name}")));
        }
        self.pids.clear();
        self.tids.clear();
        self.image.applications.push(application);
        Ok(())
    }

    fn object(&mut self, app: &mut Application, record: &Frame<'_>) -> Result<(), ImageError> {
        let extents = &mut self.extents;
        match record.kind {
            RecordKind::Process => {
                let process: Process = record.value()?;
                let pid = process.pid;
                if !process.threads.is_empty() {
                    return Err(record.invalid(format!("threads within process {pid}")));
                }
                if !self.pids.insert(pid) {
                    return Err(record.invalid(format!("a second process {pid}")));
                }
                app.processes.push(process);
            }
            RecordKind::Thread => {
                let thread: Thread = record.value()?;
                let tid = thread.tid;
                if !self.tids.insert(tid) {
                    return Err(record.invalid(format!("a second thread {tid}")));
                }
                let Some(process) = app.processes.last_mut() else {
                    return Err(record.invalid(format!("thread {tid} without a process")));
                };
                let pid = process.pid;
                if process.threads.is_empty() && tid != pid.leader() {
                    return Err(record.invalid(format!("thread {tid} is no leader of {pid}")));
                }
                process.threads.push(thread);
            }
            RecordKind::Mm => insert(&mut app.mms, record, |mm: &Mm| extents.add_mm(mm))?,
            RecordKind::Files => insert(&mut app.files, record, |_| Ok(()))?,
            RecordKind::OpenFile => insert(&mut app.ofds, record, whole)?,
            RecordKind::Content => insert(&mut app.contents, record, |content: &Content| {
                extents.add_content(content)
            })?,
            // Not within an application, see `may_follow`.
            RecordKind::System
            | RecordKind::Slots
            | RecordKind::Application
            | RecordKind::Commit => {}
        }
        Ok(())
    }
}

/// An io_uring instance is as long as it says.
fn whole(file: &OpenFile) -> Result<(), String> {
    match &file.kind {
        FileKind::IoUring(ring) if !ring.is_whole() => {
            Err("an io_uring instance of another length than its own".to_owned())
        }
        _ => Ok(()),
    }
}

/// Objects come in the order of their identities.
fn insert<K, V>(
    map: &mut BTreeMap<K, V>,
    record: &Frame<'_>,
    check: impl FnOnce(&V) -> Result<(), String>,
) -> Result<(), ImageError>
where
    K: Ord + DeserializeOwned,
    V: DeserializeOwned,
{
    let (key, value): (K, V) = record.value()?;
    if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
        return Err(record.invalid(format!("a {:?} out of order, or again", record.kind)));
    }
    check(&value).map_err(|reason| record.invalid(reason))?;
    map.insert(key, value);
    Ok(())
}

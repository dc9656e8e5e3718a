//! System V shared memory segments and semaphore sets with chosen ids (sysvipc(7)).

use nix::errno::Errno;
use nix::libc;

/// Makes the segment that is to have the id written to `/proc/sys/kernel/shm_next_id` before.
///
/// # Errors
/// `EEXIST`: the key is in use; `EINVAL`, `ENOSPC`, `ENOMEM`: a limit of this machine.
pub fn create_segment(key: i32, size: usize, mode: i32) -> Result<i32, Errno> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::shmget(key, size, flags) })
}

/// Owner and permission bits (shmctl(2) `IPC_SET`).
///
/// # Errors
/// As the system call.
pub fn set_owner(id: i32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut described: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one shmid_ds.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut described) })?;
    described.shm_perm.uid = uid;
    described.shm_perm.gid = gid;
    described.shm_perm.mode = u16::try_from(mode & 0o777).unwrap_or(0);
    // SAFETY: reads one shmid_ds.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut described) }).map(drop)
}

/// Marks a segment to be destroyed when nobody has it attached any more.
///
/// # Errors
/// As shmctl(2) `IPC_RMID`.
pub fn remove_segment(id: i32) -> Result<(), Errno> {
    let null = std::ptr::null_mut();
    // SAFETY: nothing is read or written.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, null) }).map(drop)
}

/// A segment attached to this process.
#[derive(Debug)]
pub struct Attached {
    memory: *mut u8,
    len: usize,
}

impl Attached {
    /// Attaches a segment of `len` bytes (shmat(2)).
    ///
    /// # Errors
    /// `EINVAL`: there is none, or it is smaller.
    pub fn new(id: i32, len: usize) -> Result<Self, Errno> {
        // SAFETY: plain data for which zero is valid; the kernel fills it.
        let mut described: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: writes one shmid_ds.
        Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut described) })?;
        if described.shm_segsz < len {
            return Err(Errno::EINVAL);
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if memory.addr() == usize::MAX {
            return Err(Errno::last());
        }
        Ok(Self {
            memory: memory.cast(),
            len,
        })
    }

    /// Zeroes all of it.
    pub fn clear(&mut self) {
        // SAFETY: `len` bytes are mapped, and no reference to them exists.
        unsafe { std::ptr::write_bytes(self.memory, 0, self.len) };
    }

    /// Copies bytes in; those that do not fit are left out.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let len = bytes.len().min(self.len.saturating_sub(offset));
        if len > 0 {
            // SAFETY: inside of the `len` bytes that are mapped; no reference to them exists.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.add(offset), len) };
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by us; nothing borrowed from it is left.
        unsafe { libc::shmdt(self.memory.cast()) };
    }
}

/// Makes the semaphore set that is to have the id written to `/proc/sys/kernel/sem_next_id`
/// before.
///
/// # Errors
/// `EEXIST`: the key is in use; `EINVAL`, `ENOSPC`: a limit of this machine.
pub fn create_semaphores(key: i32, count: i32, mode: i32) -> Result<i32, Errno> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semget(key, count, flags) })
}

/// Owner and permission bits of a semaphore set (semctl(2) `IPC_SET`).
///
/// # Errors
/// As the system call.
pub fn set_semaphores_owner(id: i32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut described: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one semid_ds.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut described) })?;
    described.sem_perm.uid = uid;
    described.sem_perm.gid = gid;
    described.sem_perm.mode = u16::try_from(mode & 0o777).unwrap_or(0);
    // SAFETY: reads one semid_ds.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut described) }).map(drop)
}

/// Removes a semaphore set.
///
/// # Errors
/// As semctl(2) `IPC_RMID`.
pub fn remove_semaphores(id: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// Value of one semaphore of a set (semctl(2) `GETVAL`).
///
/// # Errors
/// `EINVAL`, `EIDRM`: the set is gone.
pub fn semaphore_value(id: i32, number: i32) -> Result<i32, Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semctl(id, number, libc::GETVAL) })
}

/// Who did the last operation on one semaphore of a set (semctl(2) `GETPID`); 0 = nobody.
///
/// # Errors
/// `EINVAL`, `EIDRM`: the set is gone.
pub fn semaphore_pid(id: i32, number: i32) -> Result<i32, Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semctl(id, number, libc::GETPID) })
}

// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
public func os_proc_available_memory() -> Int { fatalError() }

package org.pytorch.executorch

/** What the runtime raises, with its number for it. */
open class ExecutorchRuntimeException(val errorCode: Int, details: String?) :
    RuntimeException("[ExecuTorch Error 0x${Integer.toHexString(errorCode)}] $details")

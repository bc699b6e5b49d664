/* sqcompile's native engine from C: open a .sqm file, run it, read its outputs.
 *
 *   sqc_model* model;
 *   sqc_session* session;
 *   sqc_status status = sqc_model_open("model.sqm", &model);
 *   if (status.code == SQC_OK) status = sqc_session_create(model, 2, &session);
 *   if (status.code == SQC_OK) status = sqc_session_run(session, inputs, input_count);
 *   if (status.code == SQC_OK) status = sqc_session_output(session, 0, &output);
 *   if (status.code != SQC_OK) fprintf(stderr, "%s\n", status.message);
 *
 * Nothing here throws, prints or aborts. A model may be shared by any number of sessions and threads; a session
 * is used by one thread at a time. SQCOMPILE_ISA in the environment forces an instruction set.
 */

#ifndef SQCOMPILE_H_
#define SQCOMPILE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SQC_API __declspec(dllexport)
#else
#define SQC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SQC_MAX_RANK 8
#define SQC_MESSAGE_BYTES 208

typedef enum sqc_code {
  SQC_OK = 0,
  SQC_INVALID_ARGUMENT = 1, /* the caller's mistake: a shape, a count, an index out of range */
  SQC_UNSUPPORTED = 2,      /* right, but not here: this CPU or this build lacks it */
  SQC_OUT_OF_MEMORY = 3,
  SQC_INTERNAL = 4,
  SQC_DAMAGED = 5,          /* the file is cut off, changed, or of another kind */
  SQC_NOT_FOUND = 6         /* the file cannot be opened */
} sqc_code;

typedef struct sqc_status {
  sqc_code code;
  char message[SQC_MESSAGE_BYTES]; /* empty when ok */
} sqc_status;

typedef enum sqc_dtype {
  SQC_F32 = 0,
  SQC_I64 = 1,
  SQC_I32 = 2,
  SQC_I8 = 3,
  SQC_U8 = 4,
  SQC_BOOL = 5
} sqc_dtype;

/* Row-major, without gaps. Of inputs the caller owns the data; of outputs the session does. */
typedef struct sqc_tensor {
  sqc_dtype dtype;
  int32_t rank;
  int64_t shape[SQC_MAX_RANK];
  const void* data;
} sqc_tensor;

/* What a model takes or returns. The name is not terminated, and lives as long as the model. */
typedef struct sqc_port {
  const char* name;
  size_t name_bytes;
  sqc_dtype dtype;
  int32_t rank;
  int64_t shape[SQC_MAX_RANK]; /* -1 where a call decides */
} sqc_port;

typedef struct sqc_model sqc_model;
typedef struct sqc_session sqc_session;

/* Maps and checks a file, which must not be changed while the model is open. */
SQC_API sqc_status sqc_model_open(const char* path, sqc_model** model);
/* Sessions keep what they need: a model may be closed before them. Null is allowed. */
SQC_API void sqc_model_close(sqc_model* model);

SQC_API size_t sqc_model_input_count(const sqc_model* model);
SQC_API size_t sqc_model_output_count(const sqc_model* model);
SQC_API sqc_status sqc_model_input(const sqc_model* model, size_t index, sqc_port* port);
SQC_API sqc_status sqc_model_output(const sqc_model* model, size_t index, sqc_port* port);

/* threads: 1 to 256, or 0 for one a core. */
SQC_API sqc_status sqc_session_create(const sqc_model* model, int threads, sqc_session** session);
SQC_API void sqc_session_destroy(sqc_session* session);
SQC_API int sqc_session_threads(const sqc_session* session);
/* Name of the instruction set in use. */
SQC_API const char* sqc_session_isa(const sqc_session* session);

/* Runs the model on one tensor for each of its inputs, in order. */
SQC_API sqc_status sqc_session_run(sqc_session* session, const sqc_tensor* inputs, size_t count);
/* An output of the last run, if that succeeded; its data stays until the next run. */
SQC_API sqc_status sqc_session_output(const sqc_session* session, size_t index, sqc_tensor* output);

#ifdef __cplusplus
}
#endif

#endif /* SQCOMPILE_H_ */

-- A worker tells the state of a guild or a source; refused when it was assigned anew since. Told twice it counts once.
-- KEYS[1] guild or broadcast record   KEYS[2] events
-- ARGV[1] generation under which the worker acts   ARGV[2] number of the report: a worker repeats only its last one
-- ARGV[3] status, JSON, '' for none   ARGV[4] event, JSON, '' for none   ARGV[5] cap of events
-- Returns 1, or 0: another generation stands there, nothing was changed; -1: there is no record, perhaps not yet again.
local held = redis.call('HMGET', KEYS[1], 'generation', 'report')
if not held[1] then return -1 end
if held[1] ~= ARGV[1] then return 0 end
local report = ARGV[1] .. '-' .. ARGV[2]
if held[2] == report then return 1 end
redis.call('HSET', KEYS[1], 'report', report)
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'status', ARGV[3]) end
if ARGV[4] ~= '' then redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'event', ARGV[4]) end
return 1
